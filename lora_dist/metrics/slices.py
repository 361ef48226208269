"""Metrics of the images that share a value, such as those of one site or camera."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_dist.metrics.intervals import NAMES, Measured, with_interval

FEW = 30
"""A slice of fewer images is marked, because its numbers say little."""


def slice_metrics(values: np.ndarray, measured: Callable[[np.ndarray], Measured]) -> dict[str, dict[str, Any]]:
    """Returns the metrics of the images of each value, by value, as JSON values.

    Args:
        values: value of each image, shape [N].
        measured: measures the images of a mask, shape [N].
    """
    found = {}
    for value in np.unique(values):
        own = values == value
        metrics, intervals = measured(own)
        found[str(value)] = {
            "num_samples": int(own.sum()),
            **metrics,
            **{f"{name}_interval": list(interval) for name, interval in intervals.items()},
            "is_small": bool(own.sum() < FEW),
        }
    return found


class SliceRow(NamedTuple):
    """A slice as text: its metrics with their intervals, by their names in a text; `images` says if these are few."""

    column: str
    value: str
    metrics: dict[str, str]
    images: str


def slice_rows(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[SliceRow]:
    """Yields the slices of each column, the worst by the first metric first; those without this metric are last."""
    for column, by_value in slices.items():
        names = [name for name in NAMES if any(name in row for row in by_value.values())]
        worst_first = sorted(by_value.items(), key=lambda one: float(np.nan_to_num(one[1][names[0]], nan=np.inf)))
        for value, row in worst_first:
            few = f", fewer than {FEW}" if row["is_small"] else ""
            metrics = {NAMES[name]: with_interval(row[name], row.get(f"{name}_interval")) for name in names}
            yield SliceRow(column, value, metrics, f"{row['num_samples']:,} images{few}")
