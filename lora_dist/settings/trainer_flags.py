"""Flags of `transformers.TrainingArguments` and of older releases that have another name here, or none."""

from collections.abc import Collection

RENAMED = {
    "auto_find_batch_size": "auto_batch_size",
    "batch_size": "per_device_train_batch_size",
    "bf16": "mixed_precision bf16",
    "data_seed": "seed",
    "epochs": "num_train_epochs",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "fp16": "mixed_precision fp16",
    "full_determinism": "deterministic",
    "logging_strategy": "logging_steps",
    "lr": "learning_rate",
    "max_steps": "max_train_steps",
    "save_steps": "checkpointing_steps",
    "save_strategy": "checkpointing_steps",
}
OF_OLDER_RELEASES = {"labels": "class_names"}
UNNECESSARY = {
    "do_eval": "every run evaluates",
    "do_train": "every run without --do_eval_only trains",
    "ignore_mismatched_sizes": "a head of another size is always replaced",
    "load_best_model_at_end": "the result is always the best checkpoint",
    "logging_dir": "TensorBoard logs are in --output_dir/tensorboard",
    "num_channels": "models see RGB images, which have 3 channels",
    "overwrite_output_dir": "runs do not overwrite each other; use another --output_dir",
    "remove_unused_columns": "only the image and label columns are read",
    "run_name": "the name of a run is its --output_dir",
    "use_cpu": "set ACCELERATE_USE_CPU=true instead",
}
LAUNCH_FILES = {
    "deepspeed": ("DeepSpeed", "zero2.yaml"),
    "fsdp": ("FSDP", "fsdp2.yaml"),
    "fsdp_config": ("FSDP", "fsdp2.yaml"),
}


def hint(flag: str, known: Collection[str]) -> str:
    """Returns advice on what to use instead of a flag of another name; empty for other flags.

    Args:
        flag: Without dashes.
        known: Flags of the command.
    """
    trains = "num_train_epochs" in known
    if trains and flag in UNNECESSARY:
        return f"; remove it: {UNNECESSARY[flag]}"
    if trains and flag in LAUNCH_FILES:
        engine, file = LAUNCH_FILES[flag]
        return (
            f"; the launch file selects {engine}: accelerate launch --config_file accelerate_configs/{file} "
            f"(`python -m lora_dist.launch_files` lists all)"
        )
    name = (RENAMED | OF_OLDER_RELEASES).get(flag, "")
    return f"; use --{name}" if name.split(" ")[0] in known else ""
