"""Flags of `transformers.TrainingArguments`, timm and older releases that have another name here, or none."""

from collections.abc import Collection

RENAMED = {
    "auto_find_batch_size": "auto_batch_size",
    "batch_size": "per_device_train_batch_size",
    "bf16": "mixed_precision bf16",
    "data_seed": "seed",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_strategy": "eval_steps",
    "evaluation_strategy": "eval_steps",
    "fp16": "mixed_precision fp16",
    "full_determinism": "deterministic",
    "logging_first_step": "logging_steps 1",
    "logging_strategy": "logging_steps",
    "lr": "learning_rate",
    "max_steps": "max_train_steps",
    "save_steps": "checkpointing_steps",
    "save_strategy": "checkpointing_steps",
    "train_batch_size": "per_device_train_batch_size",
}
OF_TIMM = {
    "aa": "augmentation",
    "amp": "mixed_precision",
    "amp_dtype": "mixed_precision",
    "b": "per_device_train_batch_size",
    "checkpoint_hist": "save_total_limit",
    "clip_grad": "max_grad_norm",
    "cutmix": "cutmix_alpha",
    "data_dir": "train_dir",
    "eval_metric": "metric_for_best_model",
    "grad_accum_steps": "gradient_accumulation_steps",
    "hflip": "horizontal_flip",
    "img_size": "image_size",
    "initial_checkpoint": "adapter_name_or_path",
    "input_size": "image_size",
    "j": "dataloader_num_workers",
    "log_interval": "logging_steps",
    "log_wandb": "report_to wandb",
    "mixup": "mixup_alpha",
    "model": "model_name_or_path",
    "model_ema": "ema_decay",
    "model_ema_decay": "ema_decay",
    "opt": "optim",
    "opt_eps": "adam_epsilon",
    "output": "output_dir",
    "reprob": "random_erasing",
    "resume": "resume_from_checkpoint",
    "scale": "crop_scale_min",
    "sched": "lr_scheduler_type",
    "smoothing": "label_smoothing_factor",
    "val_split": "validation_split",
    "validation_batch_size": "per_device_eval_batch_size",
    "warmup_epochs": "warmup_ratio",
    "workers": "dataloader_num_workers",
}
OF_OLDER_RELEASES = {"labels": "class_names"}
_WORKERS = "the loader does this by itself"
_TOKEN = "run `hf auth login`, or set HF_TOKEN"
_NAME = "the name of a run is its --output_dir"
_ON_CPUS = "set ACCELERATE_USE_CPU=true instead"
_PRECISION = "an evaluation has the precision of the training"
UNNECESSARY = {
    "bf16_full_eval": _PRECISION,
    "channels_last": "convolutional networks compute so on a GPU",
    "dataloader_drop_last": "the last, short batch of an epoch counts each sample as much as any other",
    "dataloader_persistent_workers": _WORKERS,
    "dataloader_pin_memory": _WORKERS,
    "ddp_find_unused_parameters": "every update computes a gradient of every trained weight",
    "disable_tqdm": "the bar appears on a terminal only",
    "do_eval": "every run evaluates",
    "do_predict": "set --test_dir, or use lora_dist.predict",
    "do_train": "every run without --do_eval_only trains",
    "early_stopping_threshold": "every improvement counts",
    "eval_accumulation_steps": "an evaluation keeps few numbers of each image on the device",
    "eval_delay": "--eval_steps says when to evaluate",
    "eval_on_start": "--probe measures the base before training",
    "experiment": _NAME,
    "fp16_full_eval": _PRECISION,
    "greater_is_better": "--metric_for_best_model knows which values are better",
    "hub_strategy": "pushes follow each best evaluation and the end",
    "hub_token": _TOKEN,
    "ignore_data_skip": "a resumed run continues at the next sample",
    "ignore_mismatched_sizes": "a head of another size is always replaced",
    "load_best_model_at_end": "the result is always the best checkpoint",
    "local_rank": "the launcher sets it",
    "logging_dir": "TensorBoard logs are in --output_dir/tensorboard",
    "no_cuda": _ON_CPUS,
    "num_channels": "models see RGB images, which have 3 channels",
    "num_classes": "the data has the classes",
    "overwrite_output_dir": "runs do not overwrite each other; use another --output_dir",
    "pin_mem": _WORKERS,
    "pretrained": "weights are those of the base; --init_from_config starts from random ones",
    "push_to_hub_token": _TOKEN,
    "remove_unused_columns": "only the image and label columns are read",
    "run_name": _NAME,
    "save_only_model": "checkpoints hold the trained weights and their optimizer state only",
    "save_safetensors": "all weights are saved so",
    "token": _TOKEN,
    "use_cpu": _ON_CPUS,
    "warmup_lr": "the warmup begins at 0",
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
    name = (RENAMED | OF_OLDER_RELEASES | (OF_TIMM if trains else {})).get(flag, "")
    return f"; use --{name}" if name.split(" ")[0] in known else ""
