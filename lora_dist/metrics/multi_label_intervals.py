"""Intervals of the metrics of several labels per image: mAP, micro and macro F1 of resamples."""

from typing import NamedTuple

import numpy as np

from lora_dist.metrics.intervals import RESAMPLES, Measure, Measured, bootstrap, symmetric, whole

_MOST_WEIGHTS = 2**31
"""Limit of resamples x images x labels: above it, fewer resamples are drawn."""
_FEWEST_RESAMPLES = 100


def measure_label_sets(
    predicted: np.ndarray, positive: np.ndarray, scores: np.ndarray | None, groups: np.ndarray | None = None
) -> Measured:
    """`mAP`, `micro_f1` and `macro_f1`, as `multi_label_metrics`, with their intervals (see `bootstrap`).

    Resamples repeat images, which raises the mAP of rare labels and lowers their macro F1. So an interval reaches as
    far to both sides of the value as the farther percentile.

    Args:
        predicted: whether an image is predicted to have a label, bool [N, labels].
        positive: whether it has the label, bool [N, labels].
        scores: float [N, labels]; without them, there is no mAP.
        groups: group of each image, shape [N], if groups are known.
    """
    measure = label_set_measure(predicted, positive, scores)
    metrics = whole(measure, len(predicted))
    intervals = bootstrap(measure, len(predicted), groups, label_set_resamples(predicted))
    around = {name: symmetric(metrics[name], interval) for name, interval in intervals.items()}
    return Measured(metrics, {name: (max(low, 0.0), min(high, 1.0)) for name, (low, high) in around.items()})


def label_set_resamples(predicted: np.ndarray) -> int:
    """The number of resamples for labels of this shape: `RESAMPLES`, or fewer of very many images and labels."""
    return max(_FEWEST_RESAMPLES, min(RESAMPLES, _MOST_WEIGHTS // max(1, predicted.size)))


def label_set_measure(predicted: np.ndarray, positive: np.ndarray, scores: np.ndarray | None) -> Measure:
    """Returns the function that measures resamples. Arguments as `measure_label_sets`."""
    # Sums of whole numbers below 2**24 are exact in float32.
    right, sizes = (predicted & positive).astype(np.float32), predicted.astype(np.float32) + positive
    rankings = [] if scores is None else [_ranking(*columns) for columns in zip(scores.T, positive.T, strict=True)]

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights.astype(np.float32)
        hits, total = (weights @ right).astype(np.float64), (weights @ sizes).astype(np.float64)
        f1, seen = 2 * hits / np.maximum(total, 1), total > 0
        found = {} if scores is None else {"mAP": _mean_known([one.precisions(weights) for one in rankings])}
        found["micro_f1"] = 2 * hits.sum(axis=1) / np.maximum(total.sum(axis=1), 1)
        found["macro_f1"] = np.where(seen.any(axis=1), f1.sum(axis=1) / np.maximum(seen.sum(axis=1), 1), np.nan)
        return found

    return measure


class _Ranking(NamedTuple):
    """The images of a label by descending score, to the last one that has the label, in steps of the recall.

    Attributes:
        order: images, shape [n].
        starts: place in `order` at which a step begins; a step ends with images of one score that have the label.
        holders: the images of `order` that have the label.
        holder_starts: place in `holders` at which a step begins.
    """

    order: np.ndarray
    starts: np.ndarray
    holders: np.ndarray
    holder_starts: np.ndarray

    def precisions(self, weights: np.ndarray) -> np.ndarray:
        """The average precision of each resample, shape [R]; NaN for those in which no image has the label."""
        if not len(self.starts):
            return np.full(len(weights), np.nan)
        claimed = _sums(weights, self.order, self.starts).cumsum(axis=1, dtype=np.float64)
        gains = _sums(weights, self.holders, self.holder_starts).astype(np.float64)
        hits = gains.cumsum(axis=1)
        total = hits[:, -1]
        areas = (gains * hits / np.maximum(claimed, 1)).sum(axis=1) / np.maximum(total, 1)
        return np.where(total > 0, areas, np.nan)


def _ranking(scores: np.ndarray, positive: np.ndarray) -> _Ranking:
    scores = np.nan_to_num(scores, nan=-1.0)
    order = np.argsort(-scores, kind="stable")
    ranked, own = scores[order], positive[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    ends = ends[np.diff(np.cumsum(own)[ends], prepend=0) > 0]
    size = int(ends[-1]) + 1 if len(ends) else 0
    order, own = order[:size].astype(np.int32), own[:size]
    starts = np.append(0, ends + 1)[:-1]
    return _Ranking(order, starts, order[own], np.append(0, np.cumsum(own)[ends])[:-1])


def _sums(weights: np.ndarray, images: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of weights per segment, shape [R, starts]; a segment of `images` goes from one of `starts` to the next.

    Args:
        weights: shape [R, N].
        images: columns of `weights`.
        starts: first index into `images` of each segment.
    """
    return np.add.reduceat(np.take(weights, images, axis=1), starts, axis=1)


def _mean_known(rows: list[np.ndarray]) -> np.ndarray:
    """The mean over the labels of values [R] that are not NaN; NaN where all are."""
    values = np.stack(rows)
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
