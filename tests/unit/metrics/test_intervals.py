"""Intervals and paired tests against scipy, formulas by hand, and data that are drawn many times."""

import numpy as np
import pytest
from scipy.stats import binomtest

from lora_dist.metrics.intervals import with_interval
from lora_dist.metrics.paired import compare, mcnemar
from lora_dist.metrics.single_label import accuracy_and_macro_f1, bootstrap_intervals, measure_classes
from lora_dist.metrics.slices import slice_metrics


def draw(count: int, seed: int, right: float = 0.8, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    true = random.integers(0, classes, count)
    wrong = (true + random.integers(1, classes, count)) % classes
    return true, np.where(random.random(count) < right, true, wrong)


def test_macro_f1_of_a_resample_is_that_of_the_repeated_images() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    true, predicted = draw(40, seed=1)
    predicted[3] = -1
    weights = np.random.default_rng(2).integers(0, 3, (4, 40))
    found = accuracy_and_macro_f1(weights, true, predicted)
    for row in range(4):
        a, b = np.repeat(true, weights[row]), np.repeat(predicted, weights[row])
        labels = np.setdiff1d(np.union1d(a, b), [-1])
        assert found["accuracy"][row] == pytest.approx(accuracy_score(a, b))
        assert found["macro_f1"][row] == pytest.approx(f1_score(a, b, labels=labels, average="macro", zero_division=0))


def test_the_interval_of_accuracy_is_that_of_the_binomial() -> None:
    true, predicted = draw(2000, seed=3)
    low, high = bootstrap_intervals(true, predicted)["accuracy"]
    exact = binomtest(int((true == predicted).sum()), 2000).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.003)
    assert bootstrap_intervals(true, predicted) == bootstrap_intervals(true, predicted), "seeded"


def test_about_95_of_100_intervals_hold_the_truth() -> None:
    holding = 0
    for seed in range(100):
        low, high = bootstrap_intervals(*draw(150, seed))["accuracy"]
        holding += low <= 0.8 <= high
    assert 89 <= holding <= 99


def test_images_of_a_group_count_together() -> None:
    """Twenty copies of each image tell no more than one of each."""
    true, predicted = draw(60, seed=4)
    copies, groups = np.repeat(np.stack([true, predicted]), 20, axis=1), np.repeat(np.arange(60), 20)
    low, high = bootstrap_intervals(true, predicted)["accuracy"]
    by_group = bootstrap_intervals(*copies, groups.astype(str))["accuracy"]
    by_image = bootstrap_intervals(*copies)["accuracy"]
    assert by_group == pytest.approx((low, high), abs=0.03)
    assert by_image[1] - by_image[0] < (high - low) / 3
    assert bootstrap_intervals(*copies, np.zeros(1200)) == {}, "one group says nothing of others"


def test_a_model_without_a_mistake_has_the_exact_interval() -> None:
    true = np.arange(50) % 2
    exact = binomtest(50, 50).proportion_ci(0.95, "exact")
    assert bootstrap_intervals(true, true) == {"accuracy": (pytest.approx(exact.low), 1.0)}
    assert bootstrap_intervals(true, 1 - true) == {"accuracy": (0.0, pytest.approx(1 - exact.low))}


def test_intervals_as_text() -> None:
    assert with_interval(0.9, (0.85, 0.95)) == "0.9000 (95% interval 0.8500 to 0.9500)"
    assert with_interval(0.9, None) == "0.9000"
    assert with_interval(float("nan"), None) == "undefined"


@pytest.mark.parametrize(("only_first", "only_second"), [(1, 9), (0, 0), (5, 5), (0, 6), (300, 340), (9000, 9300)])
def test_mcnemar_is_the_binomial_test(only_first: int, only_second: int) -> None:
    count = only_first + only_second
    expected = binomtest(only_first, count).pvalue if count else 1.0
    assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-6)


def test_a_comparison_counts_the_images_on_which_one_model_alone_is_right() -> None:
    first = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=bool)
    second = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=bool)
    found = compare(first, second)
    assert (found.first, found.second, found.only_first, found.only_second) == (0.4, 0.8, 1, 5)
    assert found.p_value == pytest.approx(binomtest(1, 6).pvalue)
    assert found.interval is not None
    assert found.interval[0] < 0.4 < found.interval[1]
    same = compare(first, first)
    assert (same.p_value, same.interval) == (1.0, None)


def test_a_test_of_groups_is_that_of_single_images_where_groups_are_images() -> None:
    random = np.random.default_rng(5)
    first, second = random.random(400) < 0.7, random.random(400) < 0.76
    alone, grouped = compare(first, second), compare(first, second, np.arange(400))
    assert grouped.p_value == pytest.approx(alone.p_value, abs=0.02)
    copies = compare(np.repeat(first, 10), np.repeat(second, 10), np.repeat(np.arange(400), 10))
    assert copies.p_value == pytest.approx(alone.p_value, abs=0.02)
    assert compare(np.repeat(first, 10), np.repeat(second, 10)).p_value < alone.p_value / 10


def test_slices_have_the_metrics_of_their_images() -> None:
    true, predicted = draw(100, seed=6)
    sites = np.where(np.arange(100) < 80, "north", "south")
    found = slice_metrics(sites, lambda own: measure_classes(true[own], predicted[own]))
    assert list(found) == ["north", "south"]
    for site, row in found.items():
        own = sites == site
        assert row["accuracy"] == pytest.approx((true == predicted)[own].mean())
        assert row["num_samples"] == own.sum()
        low, high = row["accuracy_interval"]
        assert low < row["accuracy"] < high
    assert [row["is_small"] for row in found.values()] == [False, True]
