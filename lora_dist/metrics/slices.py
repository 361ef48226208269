"""Accuracy and macro F1 of the images that share a value, such as those of one site or camera."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_dist.metrics.intervals import accuracy_and_macro_f1, bootstrap_intervals, with_interval

FEW = 30
"""A slice of fewer images is marked, because its numbers say little."""


def slice_metrics(
    true: np.ndarray, predicted: np.ndarray, values: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of the images of each value, by value, as JSON values.

    Args:
        true: class of each image, shape [N]; `predicted`, `groups` as for `bootstrap_intervals`.
        values: value of each image, shape [N].
    """
    found = {}
    for value in np.unique(values):
        own = values == value
        accuracy, macro_f1 = accuracy_and_macro_f1(np.ones((1, int(own.sum()))), true[own], predicted[own])[:, 0]
        intervals = bootstrap_intervals(true[own], predicted[own], None if groups is None else groups[own])
        found[str(value)] = {
            "num_samples": int(own.sum()),
            "accuracy": float(accuracy),
            "macro_f1": float(macro_f1),
            **{f"{name}_interval": list(interval) for name, interval in intervals.items()},
            "is_small": bool(own.sum() < FEW),
        }
    return found


class SliceRow(NamedTuple):
    """The metrics of a slice as text; `images` says if these are few."""

    column: str
    value: str
    accuracy: str
    macro_f1: str
    images: str


def slice_rows(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[SliceRow]:
    """Yields the slices of each column, worst accuracy first."""
    for column, by_value in slices.items():
        for value, row in sorted(by_value.items(), key=lambda one: one[1]["accuracy"]):
            few = f", fewer than {FEW}" if row["is_small"] else ""
            accuracy, macro_f1 = (
                with_interval(row[name], row.get(f"{name}_interval")) for name in ("accuracy", "macro_f1")
            )
            yield SliceRow(column, value, accuracy, macro_f1, f"{row['num_samples']:,} images{few}")
