"""Checks a data set for problems before training: `python -m lora_dist.audit --train_dir …`."""
