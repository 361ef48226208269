"""Compares two models on the same images: the difference of their accuracies, and whether it may be chance."""

from typing import NamedTuple

import numpy as np

from lora_dist.metrics.intervals import Interval, percentiles, resampled, units_of

FLIPS = 10_000
_SEED = 0


class Comparison(NamedTuple):
    """Two models on the same images.

    Attributes:
        first: accuracy of the first one, and `second` of the second one.
        interval: 95% interval of `second - first`; None if they are right on the same images.
        only_first: images on which only the first one is right, and `only_second` the second one.
        p_value: how likely a difference as large as this one is if both are equally good.
    """

    first: float
    second: float
    interval: Interval | None
    only_first: int
    only_second: int
    p_value: float


def compare(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None) -> Comparison:
    """Compares two models by McNemar's exact test.

    With groups, the interval comes from resamples of whole groups, and a permutation test flips the signs of the
    differences of whole groups.

    Args:
        first: whether the first model is right on each image, bool [N].
        second: the same for the second model.
        groups: group of each image, shape [N], of images that are not independent.
    """
    difference = second.astype(np.int64) - first.astype(np.int64)
    only_first, only_second = int((difference < 0).sum()), int((difference > 0).sum())
    units = units_of(len(first), groups)
    interval = None
    if difference.any() and units.max() > 0:
        values = [weights @ difference / weights.sum(axis=1) for weights in resampled(units)]
        interval = percentiles(np.concatenate(values))
    p_value = mcnemar(only_first, only_second) if groups is None else _flipped(np.bincount(units, weights=difference))
    return Comparison(float(first.mean()), float(second.mean()), interval, only_first, only_second, p_value)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: a fair coin gives a split as uneven as this one, or more so."""
    count, fewer = only_first + only_second, min(only_first, only_second)
    k = np.arange(fewer)
    # Logarithms of the binomial coefficients, which overflow for some thousands of images.
    log_terms = np.concatenate([[0.0], np.cumsum(np.log(count - k) - np.log(k + 1))]) - count * np.log(2)
    return float(min(1.0, 2 * np.exp(log_terms).sum()))


def _flipped(differences: np.ndarray) -> float:
    """The two-sided p-value of the sum of the differences [G] of groups, under random signs."""
    random, changed = np.random.default_rng(_SEED), differences[differences != 0]
    observed = abs(differences.sum())
    as_large = sum(
        int((np.abs(random.choice([-1, 1], (100, len(changed))) @ changed) >= observed).sum())
        for _ in range(FLIPS // 100)
    )
    return (as_large + 1) / (FLIPS + 1)
