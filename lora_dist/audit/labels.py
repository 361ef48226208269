"""Finds labels that are likely wrong, from a file of out-of-fold predictions."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lora_dist.audit.findings import KINDS, Finding, Scanned
from lora_dist.data.sources.exclusions import absolute
from lora_dist.errors import UserError
from lora_dist.metrics.label_issues import find_label_issues
from lora_dist.metrics.predictions import Predictions, read_predictions


class LabelFindings(NamedTuple):
    """Findings, the surest first, and notes about images that could not be judged."""

    findings: list[Finding]
    notes: list[str]


def label_findings(scanned: Scanned, file: str) -> LabelFindings:
    """Judges the labels of the files of an audit by a file of predictions with the probabilities of every class.

    Raises:
        UserError: the file has no probabilities, or none of its images is among the files.
    """
    predictions = read_predictions(file)
    if predictions.probabilities is None:
        raise UserError(
            f"--predictions {file}: it has no probabilities of every class; lora_dist.folds writes such a file from "
            f"runs with --fold"
        )
    rows = {absolute(path): row for row, path in enumerate(predictions.paths)}
    judged, relabelled, unknown = [], 0, 0
    for index, one in enumerate(scanned.files):
        row = rows.get(absolute(one.path))
        if row is None:
            unknown += 1
        elif predictions.given[row] != one.label or one.label not in predictions.classes:
            relabelled += 1
        else:
            judged.append((index, row))
    if not judged:
        raise UserError(
            f"--predictions {file}: it has no image of this data with the label that the image has now; its first one "
            f"is {predictions.paths[0]}"
        )
    counts = {
        f"images have no prediction in {file}": unknown,
        f"images have another label than in {file}": relabelled,
    }
    notes = [f"{count:,} {what}: their labels are not judged" for what, count in counts.items() if count]
    return LabelFindings(list(_findings(judged, predictions)), notes)


def _findings(judged: list[tuple[int, int]], predictions: Predictions) -> Iterator[Finding]:
    assert predictions.probabilities is not None
    number = {name: place for place, name in enumerate(predictions.classes)}
    given = np.array([number[predictions.given[row] or ""] for _, row in judged])
    probabilities = predictions.probabilities[[row for _, row in judged]]
    for issue in find_label_issues(given, probabilities):
        index = judged[issue.row][0]
        shares = probabilities[issue.row]
        old, new = given[issue.row], issue.suggested
        names = predictions.classes
        message = f"given {names[old]} ({shares[old]:.0%}), predicted {names[new]} ({shares[new]:.0%})"
        yield Finding(KINDS["label_issue"], message, [index], proposed=[index])
