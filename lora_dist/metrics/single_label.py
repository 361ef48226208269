"""Metrics of one class per image with their intervals: accuracy and macro F1."""

from functools import partial

import numpy as np

from lora_dist.metrics.intervals import LEVEL, Interval, Measured, bootstrap, units_of, whole


def measure_classes(true: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None = None) -> Measured:
    """Accuracy and macro F1 with their intervals. Arguments as `bootstrap_intervals`."""
    measure = partial(accuracy_and_macro_f1, true=true, predicted=predicted)
    return Measured(whole(measure, len(true)), bootstrap_intervals(true, predicted, groups))


def bootstrap_intervals(
    true: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Interval]:
    """Returns the intervals of `accuracy` and `macro_f1` (see `bootstrap`).

    A resample of a model without a mistake shows none either. Its accuracy, like that of a model that is always wrong,
    gets the exact binomial interval (Clopper-Pearson), and macro F1 gets none.

    Args:
        true: class of each image, shape [N].
        predicted: predicted class, shape [N]; -1 for none, which is wrong.
        groups: of `bootstrap`.
    """
    right = true == predicted
    count = int(units_of(len(true), groups).max(initial=-1)) + 1
    if count < 2 and groups is not None:
        return {}
    if right.all() or not right.any():
        bound = ((1 - LEVEL) / 2) ** (1 / max(1, count))
        return {"accuracy": (bound, 1.0) if right.all() else (0.0, 1 - bound)}
    classes = np.union1d(true, predicted[predicted >= 0])
    true, predicted = np.searchsorted(classes, true), np.where(predicted < 0, -1, np.searchsorted(classes, predicted))
    return bootstrap(partial(accuracy_and_macro_f1, true=true, predicted=predicted), len(true), groups)


def accuracy_and_macro_f1(weights: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """`accuracy` and `macro_f1` of each resample, shape [R]: a `Measure`.

    Classes that a resample lacks do not count, as in both metrics of the whole.
    """
    right, size = true == predicted, int(max(true.max(), predicted.max())) + 1
    hits = _by_class(weights[:, right], true[right], size)
    support = _by_class(weights, true, size)
    claimed = _by_class(weights[:, predicted >= 0], predicted[predicted >= 0], size)
    f1 = 2 * hits / np.maximum(support + claimed, 1)
    return {
        "accuracy": hits.sum(axis=1) / weights.sum(axis=1),
        "macro_f1": f1.sum(axis=1) / (support + claimed > 0).sum(axis=1),
    }


def _by_class(weights: np.ndarray, classes: np.ndarray, size: int) -> np.ndarray:
    """Sums of the weights [R, N] of the images of each class, shape [R, size]."""
    order = np.argsort(classes, kind="stable")
    found, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(weights), size))
    if len(found):
        sums[:, found] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums
