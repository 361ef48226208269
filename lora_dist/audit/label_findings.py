"""Finds labels that are likely wrong, from a file of out-of-fold predictions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_dist.audit.findings import KINDS, File, Finding, Scanned
from lora_dist.data.sources.exclusions import absolute
from lora_dist.errors import UserError
from lora_dist.metrics.label_issues import find_label_issues, find_label_set_issues
from lora_dist.metrics.predictions import Predictions, label_matrix, read_predictions

MOST_LISTED = 0.2
"""If a larger share of the labels looks wrong, the model is probably wrong instead."""


class LabelFindings(NamedTuple):
    """Findings, the surest first, and notes about images that could not be judged."""

    findings: list[Finding]
    notes: list[str]


def read_out_of_fold(file: str, multi_label: bool) -> Predictions:
    """Reads a file of predictions with the probabilities of every class, or that of a run's directory.

    Args:
        multi_label: whether the images have any number of labels, instead of one class.

    Raises:
        UserError: the file cannot be read, has no probabilities, or is of another problem type.
    """
    predictions = read_predictions(file)
    if predictions.multi_label != multi_label:
        kind, advice = ("several labels", "add") if predictions.multi_label else ("one class", "remove")
        raise UserError(
            f"--predictions {file}: it has {kind} per image: {advice} --problem_type multi_label_classification"
        )
    if predictions.probabilities is None:
        raise UserError(
            f"--predictions {file}: it has no probabilities of every class; lora_dist.folds writes such a file from "
            f"runs with --fold"
        )
    return predictions


def label_findings(scanned: Scanned, predictions: Predictions, file: str) -> LabelFindings:
    """Judges the labels of the files of an audit by the predictions that `read_out_of_fold` gave for `file`.

    Raises:
        UserError: none of the images of the predictions is among the files with the label that they have now.
    """
    rows = {absolute(path): row for row, path in enumerate(predictions.paths)}
    known = set(predictions.classes)
    judged, relabelled, unknown = [], 0, 0
    for index, one in enumerate(scanned.files):
        row = rows.get(absolute(one.path))
        names = {one.label} if one.names is None else set(one.names)
        if row is None:
            unknown += 1
        elif predictions.given[row] != _answer(one) or not names <= known:
            relabelled += 1
        else:
            judged.append((index, row))
    if not judged:
        raise UserError(
            f"--predictions {file}: none of its images is in this data with the same label. Its first image is "
            f"{predictions.paths[0]}"
        )
    counts = {
        f"images have no prediction in {file}": unknown,
        f"images have another label than in {file}": relabelled,
    }
    notes = [f"{count:,} {what}: their labels are not judged" for what, count in counts.items() if count]
    find = _of_label_sets if predictions.multi_label else _of_one_class
    chosen = predictions.select([row for _, row in judged])
    assert chosen.probabilities is not None
    findings = list(find([index for index, _ in judged], chosen, chosen.probabilities))
    listed = {index for finding in findings for index in finding.files}
    if len(listed) > MOST_LISTED * len(judged):
        notes.append(
            f"{len(listed):,} of {len(judged):,} judged images have labels that are likely wrong. So many suggest that "
            f"the model is wrong rather than the labels: look at the first ones only, or train a better model"
        )
    return LabelFindings(findings, notes)


def _answer(file: File) -> str | tuple[str, ...]:
    """The label of a file, or its labels in the order in which a file of predictions has them."""
    return file.label if file.names is None else tuple(sorted(file.names))


def _of_one_class(files: Sequence[int], predictions: Predictions, probabilities: np.ndarray) -> Iterator[Finding]:
    names = predictions.classes
    number = {name: place for place, name in enumerate(names)}
    given = np.array([number[label] for label in predictions.given])
    for issue in find_label_issues(given, probabilities):
        shares = probabilities[issue.row]
        old, new = given[issue.row], issue.suggested
        message = f"given {names[old]} ({shares[old]:.0%}), predicted {names[new]} ({shares[new]:.0%})"
        yield _finding(message, files[issue.row])


def _of_label_sets(files: Sequence[int], predictions: Predictions, probabilities: np.ndarray) -> Iterator[Finding]:
    names = predictions.classes
    for issue in find_label_set_issues(label_matrix(predictions.given, names), probabilities):
        what = "given, but not predicted" if issue.is_given else "not given, but predicted"
        yield _finding(f"{names[issue.label]} ({probabilities[issue.row, issue.label]:.0%}): {what}", files[issue.row])


def _finding(message: str, index: int) -> Finding:
    return Finding(KINDS["label_issue"], message, [index], proposed=[index])
