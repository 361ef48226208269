"""Finds labels that are likely wrong, by confident learning.

Northcutt, Jiang, Chuang: "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70 (2021),
https://arxiv.org/abs/1911.00068: the off-diagonal entries of the confident joint (section 3.2).
"""

from typing import NamedTuple

import numpy as np


class LabelIssue(NamedTuple):
    """An image whose label is likely wrong: its row, the class that is likely right, and how sure that is.

    `margin` is the probability of this class minus that of the given label.
    """

    row: int
    suggested: int
    margin: float


def find_label_issues(given: np.ndarray, probabilities: np.ndarray) -> list[LabelIssue]:
    """Returns the images whose label is likely wrong, the surest first.

    An image counts as one of class j if its probability of j is at least the mean probability of j over the images
    labelled j. Of several such classes, the one with the highest probability counts.

    Args:
        given: label of each image as a column of `probabilities`, shape [N].
        probabilities: of every class, shape [N, K], by a model that was not trained on the image. Rows that are not
            finite are left out.
    """
    finite = np.isfinite(probabilities).all(axis=1)
    thresholds = np.full(probabilities.shape[1], np.inf)
    for label in np.unique(given[finite]):
        thresholds[label] = probabilities[finite & (given == label), label].mean()
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    found = confident.argmax(axis=1)
    wrong = np.flatnonzero(finite & (confident.max(axis=1) > -np.inf) & (found != given))
    margins = probabilities[wrong, found[wrong]] - probabilities[wrong, given[wrong]]
    order = np.argsort(-margins, kind="stable")
    return [LabelIssue(int(wrong[place]), int(found[wrong[place]]), float(margins[place])) for place in order]


class MissedLabel(NamedTuple):
    """A label that an image likely has and was not given, or was given and likely has not.

    Attributes:
        row: of the image.
        label: column of the label.
        is_given: whether the image was given the label.
        margin: the probability that this is wrong, minus that it is right.
    """

    row: int
    label: int
    is_given: bool
    margin: float


def find_label_set_issues(given: np.ndarray, probabilities: np.ndarray) -> list[MissedLabel]:
    """Returns the labels of images that are likely wrong, the surest first.

    Each label is a problem of two classes of its own: images that have it, and images that do not.

    Args:
        given: whether each image was given each label, bool [N, labels].
        probabilities: of each label, shape [N, labels], by a model that was not trained on the image. Rows that are not
            finite are left out.
    """
    found = [
        MissedLabel(issue.row, label, bool(column[issue.row]), issue.margin)
        for label, (column, likely) in enumerate(zip(given.T, probabilities.T, strict=True))
        for issue in find_label_issues(column.astype(np.int64), np.stack([1 - likely, likely], axis=1))
    ]
    return sorted(found, key=lambda issue: -issue.margin)
