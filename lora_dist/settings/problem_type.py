"""Contradictions between the problem type and other settings of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_dist.settings.fields import Problem

if TYPE_CHECKING:
    from lora_dist.settings.train import Settings

MULTI_LABEL = "multi_label_classification"
_METRICS = {
    True: ("mAP", "micro_f1", "macro_f1", "loss"),
    False: ("accuracy", "balanced_accuracy", "top5_accuracy", "macro_f1", "loss"),
}
"""Metrics of several labels, and of one class per image."""


def problem_type_contradictions(settings: Settings) -> Iterator[Problem]:
    """Yields what does not work with the problem type of these settings."""
    data, optimization = settings.data, settings.optimization
    several = data.problem_type == MULTI_LABEL
    metric, known = optimization.metric_for_best_model, _METRICS[several]
    if metric not in known and (not several or "metric_for_best_model" in optimization.model_fields_set):
        text = f"{metric} is not a metric of {data.problem_type}: use {', '.join(known[:-1])} or {known[-1]}"
        yield Problem(("metric_for_best_model", "problem_type"), text)
    if not several:
        return
    if data.train_dir and not data.labels_file:
        yield Problem(
            ("problem_type", "train_dir"), "class folders give each image one class: name its labels with --labels_file"
        )
    for name in ("validation_dir", "test_dir"):
        if getattr(data, name):
            text = f"class folders give each image one class: use the column of splits of --labels_file, not --{name}"
            yield Problem(("problem_type", name), text)
    refused = {
        "streaming": (data.streaming, "labels of a stream are one class per image: remove --streaming"),
        "balanced_sampling": (
            data.balanced_sampling,
            "an image counts for several labels, so no order shows all equally often: use --class_weights balanced",
        ),
        "fold": (data.fold, "folds are those of one class per image: remove --fold"),
        "slice_columns": (data.slice_columns, "slices are those of one class per image: remove --slice_columns"),
        "probe": (settings.run.probe, "the probe is that of one class per image: remove --probe"),
        "focal_gamma": (
            optimization.focal_gamma,
            "the focal loss is that of one class per image: remove --focal_gamma",
        ),
    }
    for name, (is_set, text) in refused.items():
        if is_set:
            yield Problem(("problem_type", name), text)
