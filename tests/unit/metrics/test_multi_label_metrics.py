"""Metrics of several labels are those of scikit-learn, and each threshold is the best."""

import math

import numpy as np
import pytest
import sklearn.metrics as sklearn

from lora_dist.metrics.multi_label import average_precision, best_threshold, multi_label_metrics


def _scored(samples: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    positive = random.random((samples, labels)) < random.random(labels)
    # Rounded, so that there are equal scores.
    scores = (0.6 * random.random((samples, labels)) + 0.3 * positive).round(2).astype(np.float32)
    return scores, positive


@pytest.mark.parametrize("seed", range(5))
def test_every_number_is_that_of_scikit_learn(seed: int) -> None:
    scores, positive = _scored(80, 6, seed)
    thresholds = np.linspace(0.3, 0.7, 6, dtype=np.float32)
    metrics, per_class = multi_label_metrics(scores, positive, thresholds)
    said = scores >= thresholds
    assert metrics["mAP"] == pytest.approx(sklearn.average_precision_score(positive, scores, average="macro"))
    for average in ("micro", "macro"):
        expected = sklearn.f1_score(positive, said, average=average, zero_division=0)
        assert metrics[f"{average}_f1"] == pytest.approx(expected)
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(positive, said, zero_division=0)
    for label, row in enumerate(per_class):
        assert row["average_precision"] == pytest.approx(
            sklearn.average_precision_score(positive[:, label], scores[:, label])
        )
        assert (row["precision"], row["recall"]) == pytest.approx((precision[label], recall[label]))
        assert (row["f1"], row["support"]) == pytest.approx((f1[label], support[label]))
        (_, wrong), (missed, right) = sklearn.multilabel_confusion_matrix(positive, said)[label]
        counts = row["false_positives"], row["false_negatives"], row["true_positives"]
        assert counts == (wrong, missed, right)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_threshold_has_a_better_f1(seed: int) -> None:
    scores, positive = _scored(60, 4, seed)
    for column, own in zip(scores.T, positive.T, strict=True):
        chosen = best_threshold(column, own)
        best = max(sklearn.f1_score(own, column >= other) for other in np.unique(column))
        assert sklearn.f1_score(own, column >= np.float32(chosen)) == pytest.approx(best)
        assert not own.any() or chosen not in column.tolist(), "rounding elsewhere would change a decision"


def test_neighbouring_scores_are_told_apart() -> None:
    high = np.float32(0.7)
    low = np.nextafter(high, np.float32(0))
    scores, positive = np.array([high, low], np.float32), np.array([True, False])
    assert (scores >= np.float32(best_threshold(scores, positive))).tolist() == [True, False]


def test_labels_and_rows_without_a_value() -> None:
    """A label that no sample has counts for neither mAP; a row of NaN ranks last and has no label."""
    scores = np.array([[0.9, 0.1], [np.nan, np.nan], [0.2, 0.3]], np.float32)
    positive = np.array([[True, False], [True, False], [False, False]])
    assert best_threshold(scores[:, 1], positive[:, 1]) == 0.5
    metrics, per_class = multi_label_metrics(scores, positive, np.array([0.5, 0.5], np.float32))
    assert math.isnan(per_class[1]["average_precision"])
    assert math.isnan(average_precision(scores[:, 1], positive[:, 1]))
    assert metrics["mAP"] == pytest.approx(per_class[0]["average_precision"]) == pytest.approx((1 + 2 / 3) / 2)
    assert per_class[0]["recall"] == 0.5
    assert metrics["macro_f1"] == per_class[0]["f1"], "nobody says the second label, and nothing has it"
