"""95% intervals of metrics, by a seeded bootstrap of the images or of their groups."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
NAMES = {"accuracy": "accuracy", "mAP": "mAP", "micro_f1": "micro F1", "macro_f1": "macro F1"}
"""Metrics with intervals, in the order of the output, and their names in it."""
_SEED = 0
_HELD = 2**22
"""Largest number of sample weights (images x resamples) in memory at the same time."""

Interval = tuple[float, float]
Measure = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Takes resamples as weights [R, N]: how often each image is in each of them. Returns each metric, by name, of each
resample, shape [R]; NaN where a resample has none."""


class Measured(NamedTuple):
    """Metrics of some images by name, and the intervals of those that have one."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]

    def texts(self) -> list[str]:
        """Each metric with its interval, as text."""
        return [
            f"{NAMES[name]} {with_interval(value, self.intervals.get(name))}" for name, value in self.metrics.items()
        ]

    def __str__(self) -> str:
        return ", ".join(self.texts())


def bootstrap(
    measure: Measure, size: int, groups: np.ndarray | None = None, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Returns the interval of each metric of `size` images: the percentiles of its values in resamples.

    A metric that is the same in all resamples has no interval. Neither has any metric of a single group.

    Args:
        measure: computes the metrics.
        size: number of images.
        groups: group of each image, shape [size], of images that are not independent, such as those of a patient.
            Whole groups are resampled then.
        resamples: their number.
    """
    values = [measure(weights) for weights in resampled(units_of(size, groups), resamples)]
    found = {}
    for name in values[0]:
        known = np.concatenate([one[name] for one in values])
        known = known[~np.isnan(known)]
        if len(known) and known.min() < known.max():
            found[name] = percentiles(known)
    return found


def whole(measure: Measure, size: int) -> dict[str, float]:
    """Returns each metric of all images."""
    return {name: float(values[0]) for name, values in measure(np.ones((1, size))).items()}


def units_of(size: int, groups: np.ndarray | None) -> np.ndarray:
    """Returns a number from 0 for each of `size` images: that of its group, or its own without groups."""
    return np.arange(size) if groups is None else np.unique(groups, return_inverse=True)[1]


def with_interval(value: float, interval: Interval | None) -> str:
    """A metric and its interval, as text."""
    if math.isnan(value):
        return "undefined"
    return f"{value:.4f}" + (f" (95% interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def percentiles(values: np.ndarray) -> Interval:
    """The central interval that holds the share `LEVEL` of the values [R] of resamples."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def symmetric(value: float, interval: Interval) -> Interval:
    """The interval around `value` that reaches to both sides as far as the farther end of `interval`."""
    reach = max(value - interval[0], interval[1] - value)
    return value - reach, value + reach


def resampled(units: np.ndarray, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yields resamples, [R, N] at a time: how often each image is in each of them.

    Args:
        units: number of the group of each image, from 0, shape [N]; groups are drawn with replacement.
        resamples: their number.
    """
    random, count = np.random.default_rng(_SEED), int(units.max()) + 1
    at_once = max(1, _HELD // len(units))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)[:, units]
