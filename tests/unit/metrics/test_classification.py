"""Metrics against scikit-learn, and the calibration error against a sum done by hand."""

import json
import resource
import time
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn

from lora_dist.metrics.classification import ClassificationMetric, expected_calibration_error


def compute(num_classes: int, true: Any, predicted: Any, **more: Any) -> dict[str, Any]:
    count = len(true)
    given = {"confidences": np.full(count, 0.5), "ranks": np.zeros(count, dtype=int), "losses": np.zeros(count)}
    return ClassificationMetric(num_classes).compute(predictions=predicted, references=true, **(given | more))


def draw(num_classes: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and predictions that are right about half of the time."""
    random = np.random.default_rng(seed)
    true = random.integers(0, num_classes, count)
    return true, np.where(random.random(count) < 0.5, true, random.integers(0, num_classes, count))


@pytest.mark.parametrize(("num_classes", "count"), [(2, 50), (5, 300), (101, 400), (7, 1)])
def test_all_that_scikit_learn_knows_agrees(num_classes: int, count: int) -> None:
    """With 101 classes and 400 samples, some classes have no sample or no prediction."""
    true, predicted = draw(num_classes, count, seed=num_classes)
    results = compute(num_classes, true, predicted)
    every = list(range(num_classes))
    assert results["accuracy"] == pytest.approx(sklearn.accuracy_score(true, predicted))
    assert results["macro_f1"] == pytest.approx(sklearn.f1_score(true, predicted, average="macro", zero_division=0))
    matrix = np.zeros((num_classes, num_classes), dtype=int)
    for true_class, predicted_class, number in results["confusion"]:
        matrix[true_class, predicted_class] = number
    np.testing.assert_array_equal(matrix, sklearn.confusion_matrix(true, predicted, labels=every))
    expected = sklearn.precision_recall_fscore_support(true, predicted, labels=every, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in results["per_class"]] == pytest.approx(values.tolist()), name


def test_a_class_that_is_neither_there_nor_predicted_is_left_out_of_the_mean_f1() -> None:
    assert compute(100, [0, 1], [0, 1])["macro_f1"] == 1
    assert compute(100, [0, 1], [0, 2])["macro_f1"] == pytest.approx(1 / 3)


def test_of_five_classes_all_are_among_the_first_five() -> None:
    assert "top5_accuracy" not in compute(5, [0], [0])
    assert compute(6, [0], [0])["top5_accuracy"] == 1


def test_top_five_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(3)
    scores, true = random.random((200, 12)), random.integers(0, 12, 200)
    ranks = (scores > scores[np.arange(200), true][:, None]).sum(axis=1)
    results = compute(12, true, scores.argmax(axis=1), ranks=ranks)
    expected = sklearn.top_k_accuracy_score(true, scores, k=5, labels=list(range(12)))
    assert results["top5_accuracy"] == pytest.approx(expected)


def test_the_loss_is_the_mean_over_samples() -> None:
    assert compute(2, [0, 1, 1], [0, 0, 0], losses=[0.5, 1.0, 3.0])["loss"] == pytest.approx(1.5)


def test_calibration_error_by_hand() -> None:
    """Two bins: two of three right at 0.9 (their gap is 3 * |0.9 - 2/3|), one of two at 0.3 (2 * |0.3 - 1/2|)."""
    confidences = np.array([0.9, 0.9, 0.9, 0.3, 0.3])
    correct = np.array([True, True, False, True, False])
    assert expected_calibration_error(confidences, correct) == pytest.approx((abs(2.7 - 2) + abs(0.6 - 1)) / 5)


def test_over_and_under_confidence_cancel_in_one_bin_and_not_in_two() -> None:
    confidences, correct = np.array([0.4, 0.6]), np.array([True, False])
    assert expected_calibration_error(confidences, correct, bins=1) == pytest.approx(0)
    assert expected_calibration_error(confidences, correct, bins=2) == pytest.approx(0.6)


def test_certainty_that_is_right_is_calibrated_and_certainty_that_is_wrong_is_not() -> None:
    assert expected_calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0
    assert expected_calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1
    assert compute(2, [0, 0], [0, 1], confidences=[1.0, 1.0])["calibration_error"] == 0.5


def test_full_confidence_is_in_the_last_bin_and_not_in_one_of_its_own() -> None:
    assert expected_calibration_error(np.array([1.0, 0.95]), np.array([False, True])) == pytest.approx(0.95 / 2)


def test_a_metric_may_be_computed_again_and_forgets() -> None:
    metric = ClassificationMetric(2)
    given = {"references": [0, 1], "confidences": [1.0, 1.0], "ranks": [0, 0], "losses": [0.0, 0.0]}
    assert metric.compute(predictions=[0, 0], **given)["accuracy"] == 0.5
    assert metric.compute(predictions=[0, 1], **given)["accuracy"] == 1


def test_it_works_like_any_metric_of_evaluate() -> None:
    """Batches may be added one by one, which is what `evaluate`'s users expect."""
    metric = ClassificationMetric(3)
    for true, predicted in (([0, 1], [0, 1]), ([2], [0])):
        size = len(true)
        metric.add_batch(
            references=true, predictions=predicted, confidences=[0.5] * size, ranks=[0] * size, losses=[0.0] * size
        )
    assert metric.compute()["accuracy"] == pytest.approx(2 / 3)


def test_results_are_plain_numbers_for_json() -> None:
    true, predicted = draw(4, 30, seed=0)
    assert json.loads(json.dumps(compute(4, true, predicted)))["accuracy"] > 0


def test_many_classes_take_little_time_and_memory() -> None:
    true, predicted = draw(10_000, 20_000, seed=1)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    results = compute(10_000, true, predicted)
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10
    assert sum(number for _, _, number in results["confusion"]) == 20_000
