"""Compares two models on the same images: the difference of their metrics, and whether it may be chance."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lora_dist.metrics.intervals import Interval, bootstrap, percentiles, resampled, symmetric, units_of, whole
from lora_dist.metrics.multi_label_intervals import label_set_measure, label_set_resamples

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
    p_value = mcnemar(only_first, only_second) if groups is None else _flipped(difference[:, None], units, _size)
    return Comparison(float(first.mean()), float(second.mean()), interval, only_first, only_second, p_value)


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test.

    It is the probability that as many fair coin tosses split at least as unevenly.
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    k = np.arange(fewer)
    # Logarithms of the binomial coefficients, which overflow for some thousands of images.
    log_terms = np.concatenate([[0.0], np.cumsum(np.log(count - k) - np.log(k + 1))]) - count * np.log(2)
    return float(min(1.0, 2 * np.exp(log_terms).sum()))


class LabelSetComparison(NamedTuple):
    """Two models that give several labels to the same images.

    Attributes:
        first: metrics of the first one by name, and `second` of the second one.
        intervals: 95% intervals of the differences `second - first`; none of metrics that are the same.
        p_value: how likely a difference of the micro F1 as large as this one is if both are equally good.
    """

    first: dict[str, float]
    second: dict[str, float]
    intervals: dict[str, Interval]
    p_value: float


def compare_label_sets(
    predicted: tuple[np.ndarray, np.ndarray],
    positive: np.ndarray,
    scores: tuple[np.ndarray, np.ndarray] | None,
    groups: np.ndarray | None = None,
) -> LabelSetComparison:
    """Compares two models by a permutation test of their micro F1, which exchanges their answers for random images, or
    for all images of random groups.

    Args:
        predicted: whether each model says that an image has a label, bool [N, labels].
        positive: whether the image has it, bool [N, labels].
        scores: of each model, float [N, labels]; without them, the mAP is not compared.
        groups: group of each image, shape [N], of images that are not independent.
    """
    known = (None, None) if scores is None else scores
    measures = [label_set_measure(one, positive, score) for one, score in zip(predicted, known, strict=True)]

    def differences(weights: np.ndarray) -> dict[str, np.ndarray]:
        first, second = (measure(weights) for measure in measures)
        return {name: second[name] - first[name] for name in first}

    size = len(positive)
    measured = whole(differences, size)
    found = bootstrap(differences, size, groups, label_set_resamples(positive))
    intervals = {name: symmetric(measured[name], interval) for name, interval in found.items()}
    # Right labels, and labels predicted or given: their sums make up the micro F1.
    counts = [
        np.stack([(one & positive).sum(axis=1), one.sum(axis=1) + positive.sum(axis=1)], axis=1) for one in predicted
    ]
    total = (counts[0] + counts[1]).sum(axis=0)

    def distance(change: np.ndarray) -> np.ndarray:
        """Distance of the F1 of both models; `change` is the second model's counts minus the first's."""
        return np.abs(_micro_f1(total + change) - _micro_f1(total - change))

    p_value = _flipped(counts[1] - counts[0], units_of(size, groups), distance)
    return LabelSetComparison(whole(measures[0], size), whole(measures[1], size), intervals, p_value)


def _flipped(differences: np.ndarray, units: np.ndarray, distance: Callable[[np.ndarray], np.ndarray]) -> float:
    """The two-sided p-value of differences between two models under random signs of images, or of whole groups.

    Args:
        differences: of counts, [N, counts].
        units: number of the group of each image, from 0, shape [N].
        distance: between the models by the sum of the differences, [..., counts].
    """
    random = np.random.default_rng(_SEED)
    changed = np.stack([np.bincount(units, weights=column) for column in differences.T], axis=1)
    changed = changed[changed.any(axis=1)]
    # Equal distances may differ by a rounding.
    observed = distance(changed.sum(axis=0)) - 1e-12
    as_large = sum(
        int((distance(random.choice([-1, 1], (100, len(changed))) @ changed) >= observed).sum())
        for _ in range(FLIPS // 100)
    )
    return (as_large + 1) / (FLIPS + 1)


def _micro_f1(counts: np.ndarray) -> np.ndarray:
    return 2 * counts[..., 0] / np.maximum(counts[..., 1], 1)


def _size(change: np.ndarray) -> np.ndarray:
    return np.abs(change[..., 0])
