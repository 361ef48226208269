"""Confident learning on labels that are flipped, with probabilities whose truth is known."""

import numpy as np

from lora_dist.metrics.label_issues import find_label_issues


def test_a_flipped_label_is_found_by_hand() -> None:
    """Images labelled 0 have 0.9, 0.8 and 0.1 for class 0 and so a mean of 0.6; class 1 has a mean of 0.75."""
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.2, 0.8]])
    (issue,) = find_label_issues(np.array([0, 0, 0, 1, 1]), probabilities)
    assert (issue.row, issue.suggested) == (2, 1)
    assert issue.margin == 0.8


def test_an_uncertain_class_has_a_lower_threshold() -> None:
    """0.5 is a lot for class 1, of which the model is never sure, and little for class 0."""
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.5, 0.5], [0.6, 0.4], [0.55, 0.45]])
    assert [issue.row for issue in find_label_issues(np.array([0, 0, 0, 1, 1]), probabilities)] == [2]


def test_most_of_many_flipped_labels_are_found_and_few_others() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 10, 3000)
    logits = random.normal(0, 1, (3000, 10))
    logits[np.arange(3000), truth] += 5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    flipped = random.random(3000) < 0.05
    given = np.where(flipped, (truth + random.integers(1, 10, 3000)) % 10, truth)
    issues = find_label_issues(given, probabilities)
    rows = [issue.row for issue in issues]
    assert flipped[rows].mean() > 0.9, "precision"
    assert flipped[rows].sum() > 0.7 * flipped.sum(), "recall"
    margins = [issue.margin for issue in issues]
    assert margins == sorted(margins, reverse=True)


def test_rows_without_a_prediction_are_left_out() -> None:
    probabilities = np.array([[0.9, 0.1], [np.nan, np.nan], [0.1, 0.9], [0.2, 0.8]])
    assert [issue.row for issue in find_label_issues(np.array([0, 0, 0, 1]), probabilities)] == [2]
