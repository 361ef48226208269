"""Confident learning on labels that are flipped, with probabilities whose truth is known."""

import numpy as np

from lora_dist.metrics.label_issues import find_label_issues, find_label_set_issues


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


def test_each_of_several_labels_has_thresholds_of_its_own() -> None:
    """The first label is given to images with 0.9, 0.8 and 0.1, a mean of 0.6; the others have a mean of 0.8 without.

    The second label is rare and never sure: 0.4 is a lot for it, because the only image that has it has 0.3.
    """
    given = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 0]], dtype=bool)
    probabilities = np.array([[0.9, 0.01], [0.8, 0.4], [0.1, 0.01], [0.3, 0.3], [0.1, 0.01]])
    first, second = find_label_set_issues(given, probabilities)
    assert (first.row, first.label, first.is_given, round(first.margin, 6)) == (2, 0, True, 0.8)
    assert (second.row, second.label, second.is_given) == (1, 1, False)
    probabilities[2] = np.nan
    assert [issue.row for issue in find_label_set_issues(given, probabilities)] == [1]


def test_most_of_many_flipped_labels_of_several_are_found_and_few_others() -> None:
    """Labels of a tenth to half of the images, of which 3% are flipped."""
    random = np.random.default_rng(0)
    truth = random.random((3000, 5)) < [0.1, 0.2, 0.3, 0.4, 0.5]
    probabilities = 1 / (1 + np.exp(-random.normal(np.where(truth, 3, -3), 1.2)))
    flipped = random.random(truth.shape) < 0.03
    issues = find_label_set_issues(truth ^ flipped, probabilities)
    found = np.array([(issue.row, issue.label) for issue in issues])
    hits = flipped[found[:, 0], found[:, 1]]
    assert hits.mean() > 0.9, "precision"
    assert hits.sum() > 0.7 * flipped.sum(), "recall"
    assert [issue.is_given for issue in issues] == (truth ^ flipped)[found[:, 0], found[:, 1]].tolist()
    margins = [issue.margin for issue in issues]
    assert margins == sorted(margins, reverse=True)
