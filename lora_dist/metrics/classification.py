"""Classification metrics as an offline `evaluate.Metric`: `evaluate.load` would fetch code from the Hub."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np

CALIBRATION_BINS = 15


class ClassificationMetric(evaluate.Metric):
    """Accuracy, balanced accuracy, top-5 accuracy, macro F1, mean loss, calibration, a report by class and the
    confusion counts. Balanced accuracy is the mean recall of the classes with samples.

    Inputs of `compute`, one value per sample: `predictions` (-1 for none) and `references` (classes), `confidences`
    (probability of the prediction), `ranks` (rank of the reference among the classes by probability, from 0) and
    `losses`.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        super().__init__(keep_in_memory=True)

    def _build_data_dir(self) -> str:
        """Creates no folder below HF_HOME, which may not be writable: everything stays in memory."""
        return self._data_dir_root

    def _info(self) -> evaluate.MetricInfo:
        types = {name: datasets.Value("int64") for name in ("predictions", "references", "ranks")}
        types |= {name: datasets.Value("float32") for name in ("confidences", "losses")}
        return evaluate.MetricInfo(
            description="Classification metrics, each over every sample once.",
            citation="",
            inputs_description=type(self).__doc__ or "",
            features=datasets.Features(types),
        )

    def _compute(self, predictions: Any, references: Any, confidences: Any, ranks: Any, losses: Any) -> dict[str, Any]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        # Not a matrix, of which 10,000 classes would take 800 MB.
        some = predicted >= 0
        pairs, counts = np.unique(np.stack([true[some], predicted[some]], axis=1), axis=0, return_counts=True)
        hits = np.bincount(true[predicted == true], minlength=self.num_classes)
        claimed = np.bincount(predicted[some], minlength=self.num_classes)
        support = np.bincount(true, minlength=self.num_classes)
        precision = hits / np.maximum(claimed, 1)
        recall = hits / np.maximum(support, 1)
        f1 = 2 * hits / np.maximum(support + claimed, 1)
        seen = (support + claimed) > 0
        return {
            "accuracy": float((predicted == true).mean()),
            "balanced_accuracy": float(recall[support > 0].mean()),
            "top5_accuracy": float((np.asarray(ranks) < 5).mean()),
            "macro_f1": float(f1[seen].mean()),
            "loss": float(np.asarray(losses, dtype=np.float64).mean()),
            "calibration_error": expected_calibration_error(np.asarray(confidences), predicted == true),
            "per_class": [
                {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
                for p, r, f, n in zip(precision, recall, f1, support, strict=True)
            ],
            "confusion": np.column_stack([pairs, counts]).tolist(),
        }


def expected_calibration_error(confidences: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Mean gap between confidence and accuracy, over equal bins of confidence (https://arxiv.org/abs/1706.04599).

    `confidences` has the probability of each prediction, `correct` whether it is right, both of shape [N]. The error is
    NaN if a confidence is not finite.
    """
    if not np.isfinite(confidences).all():
        return math.nan
    _, confidence_sums, correct_sums = binned(confidences, correct, bins)
    return float(np.abs(confidence_sums - correct_sums).sum() / len(confidences))


def binned(confidences: np.ndarray, correct: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the samples in each of equal bins of confidence, and the sums of their confidences and of `correct`.

    All three have the shape [bins].
    """
    index = np.minimum((np.asarray(confidences, dtype=np.float64) * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins)
    confidence_sums, correct_sums = (
        np.bincount(index, weights=values, minlength=bins) for values in (confidences, correct)
    )
    return counts, confidence_sums, correct_sums
