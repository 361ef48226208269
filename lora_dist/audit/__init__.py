"""The audit of a data set before training: `python -m lora_dist.audit --train_dir …`."""
