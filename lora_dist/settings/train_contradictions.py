"""Combinations of settings of a training run that cannot work."""

import os
from collections.abc import Iterator

from lora_dist.settings.fields import (
    MULTI_LABEL,
    Contradiction,
    impossible_output,
    inside_data,
    missing_paths,
    same_folders,
)
from lora_dist.settings.train import DataSettings, OptimizationSettings, Settings

_METRICS = {
    True: ("mAP", "micro_f1", "macro_f1", "loss"),
    False: ("accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "loss"),
}
"""Metrics of several labels, and of one class per image."""


def contradictions(settings: Settings) -> Iterator[Contradiction]:
    """Yields every combination of settings that cannot work."""
    for check in (_problem_type, _data, _streaming, _held_out, _files, _optimization, _model, _evaluation_only, _run):
        yield from check(settings)


def _problem_type(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that do not work with the problem type."""
    data, optimization = settings.data, settings.optimization
    multi_label = data.problem_type == MULTI_LABEL
    metric, known = optimization.metric_for_best_model, _METRICS[multi_label]
    if metric not in known and (not multi_label or "metric_for_best_model" in optimization.model_fields_set):
        text = f"{metric} is not a metric of {data.problem_type}: use {', '.join(known[:-1])} or {known[-1]}"
        yield Contradiction(("metric_for_best_model", "problem_type"), text)
    if not multi_label:
        return
    if data.train_dir and not data.labels_file:
        yield Contradiction(
            ("problem_type", "train_dir"), "class folders give each image one class: name its labels with --labels_file"
        )
    for name in ("validation_dir", "test_dir"):
        if getattr(data, name):
            text = f"class folders give each image one class: use the column of splits of --labels_file, not --{name}"
            yield Contradiction(("problem_type", name), text)
    refused = {
        "streaming": (data.streaming, "streams support one class per image only: remove --streaming"),
        "balanced_sampling": (
            data.balanced_sampling,
            "an image counts for several labels, so no order shows all equally often: use --class_weights balanced",
        ),
        "probe": (settings.run.probe, "the probe supports one class per image only: remove --probe"),
        "focal_gamma": (
            optimization.focal_gamma,
            "the focal loss supports one class per image only: remove --focal_gamma",
        ),
    }
    for name, (is_set, text) in refused.items():
        if is_set:
            yield Contradiction(("problem_type", name), text)


def _data(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that name two sources of the same data, and missing ones."""
    data, run = settings.data, settings.run
    if data.train_dir and data.dataset_name:
        yield Contradiction(("train_dir", "dataset_name"), "two data sources: use only one of them")
    if not (data.train_dir or data.dataset_name or (run.do_eval_only and data.validation_dir)):
        yield Contradiction(("train_dir", "dataset_name"), "no data: set a folder of images or the name of a data set")
    if data.validation_dir and data.dataset_name:
        yield Contradiction(("validation_dir", "dataset_name"), "use --validation_split to validate with a data set")
    if data.validation_split and data.train_dir:
        yield Contradiction(("validation_split", "train_dir"), "use --validation_dir to validate with a folder")
    if data.labels_file and not data.train_dir:
        yield Contradiction(("labels_file", "train_dir"), "the file labels the images of a folder: set --train_dir")
    for name in ("split_column_name", "group_column_name"):
        if getattr(data, name) and not data.labels_file:
            yield Contradiction((name, "labels_file"), f"--{name} is a column of --labels_file: set it as well")
    if data.test_dir and data.dataset_name:
        yield Contradiction(("test_dir", "dataset_name"), "use --test_split to test with a data set")
    if data.test_split and not data.dataset_name:
        yield Contradiction(("test_split", "train_dir"), "use --test_dir to test with a folder")
    if not run.do_eval_only:
        yield from same_folders(data.train_dir, validation_dir=data.validation_dir, test_dir=data.test_dir)
        for name in ("validation_split", "test_split"):
            if getattr(data, name) == data.train_split:
                text = "the same split: metrics on training images are too good"
                yield Contradiction((name, "train_split"), text)
    if data.balanced_sampling and settings.optimization.class_weights == "balanced":
        yield Contradiction(("balanced_sampling", "class_weights"), "both balance the classes: use only one of them")


def _streaming(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that a stream, which is read forward once, does not support."""
    data, optimization = settings.data, settings.optimization
    if data.streaming:
        if data.train_dir:
            yield Contradiction(("streaming", "train_dir"), "folders cannot be streamed: remove one of them")
        elif not data.validation_split:
            yield Contradiction(
                ("streaming", "validation_split"), "a stream cannot be held out: set --validation_split"
            )
        if data.cache_dir:
            yield Contradiction(("streaming", "cache_dir"), "streams are not cached: remove one of them")
        if data.max_train_samples:
            yield Contradiction(
                ("streaming", "max_train_samples"), "streams are not sampled: use --max_train_steps instead"
            )
        for name, is_set in {
            "class_weights": optimization.class_weights != "none",
            "balanced_sampling": data.balanced_sampling,
        }.items():
            if is_set:
                yield Contradiction(
                    ("streaming", name), "a stream's labels are not known in advance: remove one of them"
                )
        if "[" in data.train_split or "+" in data.train_split:
            yield Contradiction(
                ("streaming", "train_split"), "streams do not support slices or sums: set one whole split"
            )
    elif data.streaming_lanes:
        yield Contradiction(("streaming_lanes", "streaming"), "lanes need a stream: add --streaming")


def _held_out(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that contradict folds and slices."""
    data = settings.data
    if data.slice_columns and (data.train_dir or data.validation_dir):
        if not data.labels_file:
            text = "a folder of classes has no columns: name them in --labels_file"
            yield Contradiction(("slice_columns", "labels_file"), text)
        elif data.validation_dir:
            text = "the validation images are not in --labels_file: add them there, with a column of splits"
            yield Contradiction(("slice_columns", "validation_dir"), text)
    if data.fold:
        for name in ("validation_dir", "validation_split", "streaming", "max_eval_samples"):
            if getattr(data, name):
                yield Contradiction(("fold", name), "a fold of the training images is the validation data: remove one")
        if data.train_val_split != DataSettings().train_val_split:
            yield Contradiction(
                ("fold", "train_val_split"), "the number of folds decides how many are held out: remove one"
            )


def _files(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings of files that are missing or cannot be written."""
    data, run = settings.data, settings.run
    if data.exclude and data.dataset_name:
        yield Contradiction(("exclude", "dataset_name"), "only images in folders can be excluded: remove one of them")
    yield from missing_paths(data.train_dir, data.validation_dir, data.exclude, data.test_dir, data.labels_file)
    weights = settings.optimization.class_weights
    if weights not in ("none", "balanced") and not os.path.isfile(weights):  # noqa: PTH113
        yield Contradiction(("class_weights",), f"no such file: {weights}; the values are none, balanced, or a file")
    yield from impossible_output(run.output_dir)
    folders = {name: getattr(data, name) for name in ("train_dir", "validation_dir", "test_dir")}
    if data.labels_file:  # files that are not listed are no part of the data
        del folders["train_dir"]
    yield from inside_data("output_dir", run.output_dir, **folders)
    yield from inside_data("cache_dir", data.cache_dir, **folders)


def _optimization(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that contradict the augmentation, the schedule or the optimizer."""
    model, optimization = settings.model, settings.optimization
    if settings.augmentation.augment_on_device and settings.augmentation.augmentation != "basic":
        text = "the device supports only crops and flips: use --augmentation basic or remove --augment_on_device"
        yield Contradiction(("augment_on_device", "augmentation"), text)
    if optimization.warmup_steps and optimization.warmup_ratio:
        yield Contradiction(("warmup_steps", "warmup_ratio"), "two warmup lengths: use only one of them")
    if optimization.min_lr and optimization.lr_scheduler_type == "constant":
        yield Contradiction(("min_lr", "lr_scheduler_type"), "a constant learning rate has no minimum: remove --min_lr")
    if optimization.layer_decay != 1 and model.tuning == "head":
        yield Contradiction(
            ("layer_decay", "tuning"), "only the head trains, and its rate does not decay: remove --layer_decay"
        )
    if settings.lora.train_norms and model.tuning != "lora":
        yield Contradiction(
            ("train_norms", "tuning"), "norms train in addition to LoRA, or with all weights: remove one of them"
        )
    for name in ("momentum",) if optimization.optim == "adamw_torch" else ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if getattr(optimization, name) != OptimizationSettings.model_fields[name].default:
            yield Contradiction((name, "optim"), f"{optimization.optim} does not use --{name}: remove one of them")
    learning_rate = settings.with_default_learning_rate().optimization.learning_rate
    if optimization.min_lr > learning_rate:
        yield Contradiction(("min_lr", "learning_rate"), f"the minimum exceeds the learning rate of {learning_rate:g}")
    if optimization.early_stopping_patience and settings.run.eval_steps == "no":
        yield Contradiction(
            ("early_stopping_patience", "eval_steps"), "early stopping needs evaluations: set --eval_steps"
        )


def _model(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that the base or the adapter does not support."""
    model, run, optimization = settings.model, settings.run, settings.optimization
    odd = [rank for rank in (settings.lora.lora_r, *settings.lora.lora_rank_pattern.values()) if rank % 2]
    if settings.lora.init_lora_weights == "orthogonal" and odd:
        text = f"an orthogonal start needs even ranks, and {odd[0]} is odd"
        yield Contradiction(("init_lora_weights", "lora_r", "lora_rank_pattern"), text)
    if model.init_from_config and model.tuning != "full":
        yield Contradiction(("init_from_config", "tuning"), "random weights need full training: add --tuning full")
    if model.adapter_name_or_path and model.image_processor_name:
        text = "the adapter has its own image processor: remove --image_processor_name"
        yield Contradiction(("adapter_name_or_path", "image_processor_name"), text)
    if model.adapter_name_or_path and not run.do_eval_only:
        if model.tuning != "lora":
            yield Contradiction(("adapter_name_or_path", "tuning"), "adapters continue as LoRA: remove one of them")
        if settings.lora.init_lora_weights != "default":
            text = "the adapter sets the initial weights: remove one of them"
            yield Contradiction(("adapter_name_or_path", "init_lora_weights"), text)
    if model.base_dtype != "float32":
        if model.tuning == "full":
            yield Contradiction(
                ("base_dtype", "tuning"), "nothing is frozen: remove one of them, see --mixed_precision"
            )
        if settings.lora.lora_bias != "none":
            yield Contradiction(
                ("base_dtype", "lora_bias"), "biases train in the dtype of their layers: remove one of them"
            )
        if optimization.mixed_precision in ("bf16", "fp16"):
            text = "the model computes in the dtype of its base, without autocast: remove --mixed_precision"
            yield Contradiction(("base_dtype", "mixed_precision"), text)
        if run.do_eval_only:
            yield Contradiction(("do_eval_only", "base_dtype"), "the base is evaluated in fp32: remove --base_dtype")


def _evaluation_only(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that contradict --do_eval_only."""
    model, data, run, hub = settings.model, settings.data, settings.run, settings.hub
    for name in ("test_dir", "test_split"):
        if run.do_eval_only and getattr(data, name):
            text = "to evaluate on test data alone, name it with --validation_dir or --validation_split"
            yield Contradiction(("do_eval_only", name), text)
    if run.do_eval_only and not model.adapter_name_or_path:
        yield Contradiction(("do_eval_only", "adapter_name_or_path"), "nothing to evaluate: set --adapter_name_or_path")
    for name in ("transparent_background", "pixel_range", "pooling", "image_size"):
        if run.do_eval_only and name in data.model_fields_set | model.model_fields_set:
            yield Contradiction(("do_eval_only", name), f"the model records how it was trained: remove --{name}")
    if run.do_eval_only and run.dry_run:
        yield Contradiction(("dry_run", "do_eval_only"), "dry runs are for training: remove one of them")
    if run.do_eval_only and run.resume_from_checkpoint:
        yield Contradiction(
            ("do_eval_only", "resume_from_checkpoint"), "evaluations cannot be resumed: remove one of them"
        )
    if run.report_to and run.do_eval_only:
        yield Contradiction(("report_to", "do_eval_only"), "evaluations are printed, not tracked: remove one of them")
    if hub.push_to_hub and run.do_eval_only:
        yield Contradiction(("push_to_hub", "do_eval_only"), "evaluations have nothing to push: remove one of them")


def _run(settings: Settings) -> Iterator[Contradiction]:
    """Yields settings that contradict the probe or the Hub."""
    data, run, hub = settings.data, settings.run, settings.hub
    if run.probe and (data.streaming or run.do_eval_only):
        other = "streaming" if data.streaming else "do_eval_only"
        yield Contradiction(("probe", other), "the features of all training images are needed: remove one of them")
    if (hub.hub_model_id or hub.hub_private_repo) and not hub.push_to_hub:
        yield Contradiction(("hub_model_id", "hub_private_repo", "push_to_hub"), "nothing is pushed: add --push_to_hub")
