"""What flags of `transformers.TrainingArguments` are called here, for those who come from it."""

from collections.abc import Collection

NAMES = {
    "auto_find_batch_size": "auto_batch_size",
    "batch_size": "per_device_train_batch_size",
    "bf16": "mixed_precision bf16",
    "data_seed": "seed",
    "epochs": "num_train_epochs",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "fp16": "mixed_precision fp16",
    "logging_strategy": "logging_steps",
    "max_steps": "max_train_steps",
    "save_steps": "checkpointing_steps",
    "save_strategy": "checkpointing_steps",
}
NEEDLESS = {
    "do_eval": "it always evaluates",
    "do_train": "it trains unless told --do_eval_only",
    "ignore_mismatched_sizes": "a head of another size is always made anew",
    "load_best_model_at_end": "the best checkpoint is always what is handed over",
    "logging_dir": "curves are in the directory tensorboard of --output_dir",
    "optim": "the optimizer is AdamW",
    "overwrite_output_dir": "name another --output_dir, as no run overwrites another",
    "remove_unused_columns": "only the columns of images and labels are read",
    "report_to": "TensorBoard always gets everything",
    "run_name": "runs are called after their --output_dir",
    "use_cpu": "ACCELERATE_USE_CPU=true does it",
}


def hint(flag: str, known: Collection[str]) -> str:
    """What to write instead of a flag of `TrainingArguments`; empty for others, and where a command has neither.

    Args:
        flag: without its dashes.
        known: flags of the command.
    """
    if "output_dir" in known and flag in NEEDLESS:
        return f"; leave it out: {NEEDLESS[flag]}"
    name = NAMES.get(flag, "")
    return f"; here it is --{name}" if name.split(" ")[0] in known else ""
