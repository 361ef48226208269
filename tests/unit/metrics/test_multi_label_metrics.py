"""Metrics of several labels are those of scikit-learn, and each threshold is the best."""

import math

import numpy as np
import pytest
import sklearn.metrics as sklearn

from lora_dist.metrics.multi_label import average_precision, best_threshold, multi_label_metrics
from lora_dist.metrics.multi_label_intervals import label_set_measure, measure_label_sets
from lora_dist.metrics.paired import compare_label_sets
from lora_dist.metrics.slices import slice_metrics, slice_rows


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


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_a_resample_are_those_of_the_repeated_images(seed: int) -> None:
    scores, positive = _scored(50, 5, seed)
    scores[7], positive[:, 4] = np.nan, False
    thresholds = np.linspace(0.3, 0.7, 5, dtype=np.float32)
    weights = np.random.default_rng(seed).integers(0, 3, (4, 50))
    found = label_set_measure(scores >= thresholds, positive, scores)(weights)
    assert list(found) == ["mAP", "micro_f1", "macro_f1"]
    for row in range(4):
        repeated = np.repeat(scores, weights[row], axis=0), np.repeat(positive, weights[row], axis=0)
        expected, _ = multi_label_metrics(*repeated, thresholds)
        assert {name: values[row] for name, values in found.items()} == pytest.approx(expected)


def test_a_resample_without_a_label_has_no_map() -> None:
    measure = label_set_measure(np.zeros((2, 1), bool), np.array([[True], [False]]), np.array([[0.9], [0.1]]))
    found = measure(np.array([[0, 2], [2, 0]]))
    assert np.isnan(found["mAP"]).tolist() == [True, False]
    assert np.isnan(found["macro_f1"]).tolist() == [True, False]
    assert found["micro_f1"].tolist() == [0, 0]


def _drawn(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of a model whose metrics are the same for every seed, but for chance."""
    random = np.random.default_rng(seed)
    positive = random.random((samples, 4)) < [0.5, 0.3, 0.2, 0.4]
    return (0.6 * random.random(positive.shape) + 0.3 * positive).astype(np.float32), positive


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    scores, positive = _drawn(100_000, 0)
    truth, _ = multi_label_metrics(scores, positive, np.full(4, 0.5))
    holding = dict.fromkeys(truth, 0)
    for seed in range(1, 101):
        scores, positive = _drawn(150, seed)
        for name, (low, high) in measure_label_sets(scores >= 0.5, positive, scores).intervals.items():
            holding[name] += low <= truth[name] <= high
    assert all(88 <= count <= 99 for count in holding.values()), holding


def test_rare_labels_do_not_move_intervals_away_from_the_value() -> None:
    """Repeated images raise the mAP of labels with few images: percentiles alone hold the truth 4 times in 10."""
    random = np.random.default_rng(0)
    shares = np.full(10, 0.15)
    positive = random.random((100_000, 10)) < shares
    truth, _ = multi_label_metrics(random.normal(size=positive.shape) + positive, positive, np.ones(10))
    holding = 0
    for seed in range(1, 41):
        random = np.random.default_rng(seed)
        positive = random.random((40, 10)) < shares
        scores = random.normal(size=positive.shape) + positive
        metrics, intervals = measure_label_sets(scores >= 1, positive, scores)
        assert all(low < metrics[name] < high for name, (low, high) in intervals.items())
        assert all(0 <= low < high <= 1 for low, high in intervals.values())
        holding += intervals["mAP"][0] <= truth["mAP"] <= intervals["mAP"][1]
    assert holding >= 30


def test_intervals_are_seeded_by_group_and_not_of_what_never_changes() -> None:
    scores, positive = _drawn(60, 1)
    found = measure_label_sets(scores >= 0.5, positive, scores)
    assert found == measure_label_sets(scores >= 0.5, positive, scores)
    assert str(found).startswith(f"mAP {found.metrics['mAP']:.4f} (95% interval ")
    copies, labels = np.repeat(scores, 10, axis=0), np.repeat(positive, 10, axis=0)
    grouped = measure_label_sets(copies >= 0.5, labels, copies, np.repeat(np.arange(60), 10))
    for name, (low, high) in found.intervals.items():
        assert grouped.intervals[name] == pytest.approx((low, high), abs=0.05)
    assert measure_label_sets(positive, positive, positive.astype(float)).intervals == {}
    assert measure_label_sets(scores >= 0.5, positive, scores, np.zeros(60)).intervals == {}
    assert list(measure_label_sets(scores >= 0.5, positive, None).metrics) == ["micro_f1", "macro_f1"]


def test_a_comparison_is_of_the_same_images() -> None:
    """The difference is surer than the two numbers, because both models have the same images."""
    random = np.random.default_rng(0)
    scores, positive = _drawn(300, 2)
    worse = np.where(random.random((300, 1)) < 0.15, random.random((300, 4)), scores)
    found = compare_label_sets((worse >= 0.5, scores >= 0.5), positive, (worse, scores))
    assert found.second == multi_label_metrics(scores, positive, np.full(4, 0.5))[0]
    for name in ("mAP", "micro_f1", "macro_f1"):
        low, high = found.intervals[name]
        assert low < found.second[name] - found.first[name] < high
    assert found.p_value < 0.01
    alone = measure_label_sets(scores >= 0.5, positive, scores).intervals["micro_f1"]
    low, high = found.intervals["micro_f1"]
    assert high - low < alone[1] - alone[0]
    other = compare_label_sets((scores >= 0.5, worse >= 0.5), positive, None)
    assert other.p_value == found.p_value
    assert list(other.first) == ["micro_f1", "macro_f1"]
    same = compare_label_sets((scores >= 0.5, scores >= 0.5), positive, None)
    assert (same.p_value, same.intervals) == (1.0, {})


def test_p_values_of_equal_models_are_even() -> None:
    """Of models that differ by chance alone, a tenth has a p-value of at most a tenth."""
    small = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        positive = random.random((40, 3)) < 0.4
        said = [np.where(random.random((40, 3)) < 0.2, ~positive, positive) for _ in range(2)]
        small += compare_label_sets((said[0], said[1]), positive, None).p_value <= 0.1
    assert 1 <= small <= 13


def test_copies_of_a_group_tell_no_more_than_one() -> None:
    random = np.random.default_rng(3)
    positive = random.random((40, 3)) < 0.4
    said = [np.where(random.random((40, 3)) < share, ~positive, positive) for share in (0.25, 0.15)]
    alone = compare_label_sets((said[0], said[1]), positive, None)
    copies = [np.repeat(one, 10, axis=0) for one in (*said, positive)]
    grouped = compare_label_sets((copies[0], copies[1]), copies[2], None, np.repeat(np.arange(40), 10))
    assert grouped.p_value == pytest.approx(alone.p_value, abs=0.02)
    assert compare_label_sets((copies[0], copies[1]), copies[2], None).p_value < alone.p_value / 5


def test_a_slice_without_a_label_is_last() -> None:
    scores, positive = _drawn(60, 4)
    sites = np.repeat(["east", "north", "south"], [10, 40, 10])
    positive[:10] = False
    found = slice_metrics(sites, lambda own: measure_label_sets(scores[own] >= 0.5, positive[own], scores[own]))
    assert math.isnan(found["east"]["mAP"])
    assert [found[site]["is_small"] for site in sites[[0, 10, 50]]] == [True, False, True]
    rows = list(slice_rows({"site": found}))
    assert rows[-1].value == "east"
    assert rows[-1].metrics["mAP"] == "undefined"
    assert rows[-1].images == "10 images, fewer than 30"
    north, _ = multi_label_metrics(scores[10:50], positive[10:50], np.full(4, 0.5))
    assert {name: found["north"][name] for name in north} == pytest.approx(north)
