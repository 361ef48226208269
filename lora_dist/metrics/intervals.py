"""95% intervals of accuracy and macro F1, by a seeded bootstrap of the images or of their groups."""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_SEED = 0
_HELD = 2**22
"""Most weights that are in memory at the same time."""

Interval = tuple[float, float]


def bootstrap_intervals(
    true: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Interval]:
    """Returns the interval of `accuracy` and of `macro_f1`: the percentiles of their values in `RESAMPLES` resamples.

    A resample of a model without a mistake shows none either. Its accuracy, like that of a model that is always wrong,
    gets the exact binomial interval (Clopper-Pearson), and macro F1 gets none.

    Args:
        true: class of each image, shape [N].
        predicted: predicted class, shape [N]; -1 for none, which is wrong.
        groups: group of each image, shape [N], of images that are not independent, such as those of a patient. Whole
            groups are resampled then. One group alone has no interval.
    """
    units = units_of(len(true), groups)
    right, count = true == predicted, int(units.max(initial=-1)) + 1
    if count < 2 and groups is not None:
        return {}
    if right.all() or not right.any():
        bound = ((1 - LEVEL) / 2) ** (1 / max(1, count))
        return {"accuracy": (bound, 1.0) if right.all() else (0.0, 1 - bound)}
    classes = np.union1d(true, predicted[predicted >= 0])
    true, predicted = np.searchsorted(classes, true), np.where(predicted < 0, -1, np.searchsorted(classes, predicted))
    values = [accuracy_and_macro_f1(weights, true, predicted) for weights in resampled(units)]
    accuracy, macro_f1 = np.concatenate(values, axis=1)
    return {"accuracy": percentiles(accuracy), "macro_f1": percentiles(macro_f1)}


def units_of(size: int, groups: np.ndarray | None) -> np.ndarray:
    """Returns a number from 0 for each of `size` images: that of its group, or its own without groups."""
    return np.arange(size) if groups is None else np.unique(groups, return_inverse=True)[1]


def with_interval(value: float, interval: Interval | None) -> str:
    """A metric and its interval, as text."""
    return f"{value:.4f}" + (f" (95% interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def percentiles(values: np.ndarray) -> Interval:
    """The interval that has `LEVEL` of the values [R] of resamples, and as many below as above it."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def resampled(units: np.ndarray) -> Iterator[np.ndarray]:
    """Yields `RESAMPLES` resamples, [R, N] at a time: how often each image is in each of them.

    Args:
        units: number of the group of each image, from 0, shape [N]; groups are drawn with replacement.
    """
    random, count = np.random.default_rng(_SEED), int(units.max()) + 1
    at_once = max(1, _HELD // len(units))
    for start in range(0, RESAMPLES, at_once):
        rows = min(at_once, RESAMPLES - start)
        drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)[:, units]


def accuracy_and_macro_f1(weights: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Accuracy and macro F1 of each resample, shape [2, R]. Classes that a resample lacks do not count, as in both
    metrics of the whole."""
    right, size = true == predicted, int(max(true.max(), predicted.max())) + 1
    hits = _by_class(weights[:, right], true[right], size)
    support = _by_class(weights, true, size)
    claimed = _by_class(weights[:, predicted >= 0], predicted[predicted >= 0], size)
    f1 = 2 * hits / np.maximum(support + claimed, 1)
    return np.stack([hits.sum(axis=1) / weights.sum(axis=1), f1.sum(axis=1) / (support + claimed > 0).sum(axis=1)])


def _by_class(weights: np.ndarray, classes: np.ndarray, size: int) -> np.ndarray:
    """Sums of the weights [R, N] of the images of each class, shape [R, size]."""
    order = np.argsort(classes, kind="stable")
    found, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(weights), size))
    if len(found):
        sums[:, found] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums
