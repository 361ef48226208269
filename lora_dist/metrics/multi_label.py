"""Metrics of several labels per image, and the thresholds that give each label its best F1."""

import math
from typing import Any

import numpy as np

NEUTRAL = 0.5
"""Threshold of a label that no image has, and of a model that records none."""


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the steps of precision over recall, as `average_precision_score` of scikit-learn; NaN without
    positives.

    `scores` and `positive` have the shape [N]. Equal scores are one step.
    """
    precision, recall, _ = _curve(scores, positive)
    return float((np.diff(recall, prepend=0.0) * precision).sum()) if positive.any() else math.nan


def best_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the threshold with the highest F1 of `scores >= threshold`; of several, the one nearest to 0.5.

    The threshold is a float32 between two scores, so that rounding elsewhere changes no decision about these samples. A
    label that no sample has gets `NEUTRAL`.
    """
    if not positive.any():
        return NEUTRAL
    precision, recall, found = _curve(scores, positive)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    below = np.append(found[1:], 0.0)
    middles = np.maximum((found + below) / 2, 0.0).astype(np.float32)
    # Between neighbours among the float32, there is no middle.
    middles = np.where(middles <= below, found, middles)
    best = middles[np.isclose(f1, f1.max(), rtol=0, atol=1e-12)]
    return float(best[np.abs(best - NEUTRAL).argmin()])


def _curve(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall of the samples at or above each distinct score, and the scores, descending; NaN as -1."""
    scores = np.nan_to_num(scores, nan=-1.0)
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order].astype(np.float64), np.cumsum(positive[order])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    return hits[last] / (last + 1), hits[last] / max(1, positive.sum()), ranked[last]


def multi_label_metrics(
    scores: np.ndarray, positive: np.ndarray, thresholds: np.ndarray
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over all samples, and those of each label.

    Args:
        scores: of each label, float32 [N, labels]. NaN, from logits that are not finite, ranks last and reaches no
            threshold.
        positive: the labels of the samples, bool [N, labels].
        thresholds: of each label, float32 [labels].

    Returns:
        `mAP`, the mean average precision of the labels that a sample has; `micro_f1` over all decisions; `macro_f1`,
        the mean F1 of the labels that a sample has or is predicted to have. And for each label average precision,
        precision, recall, F1, threshold, support and the counts of right and wrong decisions.
    """
    predicted = scores >= thresholds
    right, claimed, support = (predicted & positive).sum(axis=0), predicted.sum(axis=0), positive.sum(axis=0)
    precisions = [average_precision(*columns) for columns in zip(scores.T, positive.T, strict=True)]
    f1 = 2 * right / np.maximum(support + claimed, 1)
    seen = (support + claimed) > 0
    known = [value for value in precisions if not math.isnan(value)]
    metrics = {
        "mAP": float(np.mean(known)) if known else math.nan,
        "micro_f1": float(2 * right.sum() / max(1, support.sum() + claimed.sum())),
        "macro_f1": float(f1[seen].mean()) if seen.any() else math.nan,
    }
    per_class = [
        {
            "average_precision": precisions[label],
            "precision": float(right[label] / max(1, claimed[label])),
            "recall": float(right[label] / max(1, support[label])),
            "f1": float(f1[label]),
            "threshold": float(thresholds[label]),
            "support": int(support[label]),
            "true_positives": int(right[label]),
            "false_positives": int(claimed[label] - right[label]),
            "false_negatives": int(support[label] - right[label]),
        }
        for label in range(len(thresholds))
    ]
    return metrics, per_class
