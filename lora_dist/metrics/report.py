"""Predictions against labels, and two sets of predictions against each other, as lines of text."""

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_dist.errors import UserError
from lora_dist.metrics.intervals import NAMES, Interval, Measured
from lora_dist.metrics.multi_label_intervals import measure_label_sets
from lora_dist.metrics.paired import compare, compare_label_sets
from lora_dist.metrics.predictions import Predictions, label_matrix
from lora_dist.metrics.single_label import measure_classes

MOST_CLASSES = 100
"""Largest number of classes in the report by class."""
MATRIX_CLASSES = 20
"""Largest number of classes for a whole confusion matrix; beyond it, the most frequent confusions are printed."""
_CONFUSIONS = 20
_DISAGREEMENTS = 20
_WIDTH = 100
"""Columns of a line of text; a single name may be longer."""


def metric_lines(predictions: Predictions) -> Iterator[str]:
    """Yields the metrics of labelled images with intervals."""
    return itertools.takewhile(bool, evaluation_lines(predictions))


def evaluation_lines(predictions: Predictions) -> Iterator[str]:
    """Yields the metrics of labelled images with intervals, and after an empty line the report by class.

    Of one class per image, these are accuracy, macro F1 and the confusion matrix; of several labels, mAP if all scores
    are known, micro and macro F1.
    """
    yield from (_label_set_lines if predictions.multi_label else _one_class_lines)(predictions)


def _one_class_lines(predictions: Predictions) -> Iterator[str]:
    names = sorted({name for name in (*predictions.given, *predictions.predicted) if name is not None})
    number = {name: index for index, name in enumerate(names)}
    true = np.array([number[name] for name in predictions.given])
    predicted = np.array([-1 if name is None else number[name] for name in predictions.predicted])
    yield from _metric_lines(len(true), measure_classes(true, predicted, groups_of(predictions)))
    matrix = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    np.add.at(matrix, (true, predicted), 1)
    # The last column counts images without a prediction.
    yield from _class_lines(names, np.diag(matrix), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0))
    yield from _confusion_lines(names, matrix)


def _label_set_lines(predictions: Predictions) -> Iterator[str]:
    names = _all_labels(predictions)
    predicted, positive = label_matrix(predictions.predicted, names), label_matrix(predictions.given, names)
    yield from _metric_lines(
        len(predicted), measure_label_sets(predicted, positive, _scores(predictions, names), groups_of(predictions))
    )
    yield from _class_lines(
        names, (predicted & positive).sum(axis=0), positive.sum(axis=0), predicted.sum(axis=0), "label"
    )


def _metric_lines(count: int, measured: Measured) -> Iterator[str]:
    yield f"{count:,} images:"
    yield from (f"    {text}" for text in measured.texts())


def _all_labels(*several: Predictions) -> list[str]:
    """Returns all labels that occur as given or predicted ones, or that have scores, sorted."""
    found = {name for one in several for names in (*one.given, *one.predicted) for name in names or ()}
    return sorted(found.union(*(one.classes for one in several)))


def _scores(predictions: Predictions, names: Sequence[str]) -> np.ndarray | None:
    """The score of each of these labels, if all are known."""
    return predictions.probabilities if predictions.classes == list(names) else None


def _class_lines(
    names: Sequence[str], hits: np.ndarray, support: np.ndarray, claimed: np.ndarray, word: str = "class"
) -> Iterator[str]:
    """Precision, recall and F1 of each class, by its images that are right, that have it, and that are predicted to."""
    rows = [[word, "precision", "recall", "F1", "images"]]
    for index, name in enumerate(names[:MOST_CLASSES]):
        f1 = 2 * hits / np.maximum(support + claimed, 1)
        shares = (hits / np.maximum(claimed, 1), hits / np.maximum(support, 1), f1)
        rows.append([name, *(f"{values[index]:.3f}" for values in shares), str(support[index])])
    yield ""
    yield from _aligned(rows)
    if len(names) > MOST_CLASSES:
        yield f"… and {len(names) - MOST_CLASSES:,} more"


def _confusion_lines(names: Sequence[str], matrix: np.ndarray) -> Iterator[str]:
    yield ""
    if len(names) <= MATRIX_CLASSES:
        columns = [*names, "none"] if matrix[:, -1].any() else list(names)
        yield "confusion matrix: rows are labels, columns are predictions"
        yield from _aligned(
            [["", *columns]] + [[name, *map(str, matrix[index, : len(columns)])] for index, name in enumerate(names)]
        )
        return
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    yield "most frequent confusions"
    rows = [["label", "predicted", "images"]]
    for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[true, predicted]:
            rows.append([names[true], [*names, "none"][predicted], str(wrong[true, predicted])])
    yield from _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The cells of a table in columns; the first one to the left, the others to the right."""
    shown = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()


def groups_of(predictions: Predictions) -> np.ndarray | None:
    """Group of each image, shape [N]; None unless all of them have one."""
    return None if None in predictions.groups else np.array(predictions.groups)


def _groups_of_either(first: Predictions, second: Predictions) -> np.ndarray | None:
    """Group of each image, by the first of two sets of predictions that has them."""
    groups = groups_of(first)
    return groups_of(second) if groups is None else groups


class Pair(NamedTuple):
    """Predictions of two models for the same images, in the same order."""

    first: Predictions
    second: Predictions
    left_out: int

    def disagreements(self) -> list[int]:
        """Rows for which the two models predict different classes."""
        pairs = zip(self.first.predicted, self.second.predicted, strict=True)
        return [row for row, (one, other) in enumerate(pairs) if one != other]


def paired(first: Predictions, second: Predictions) -> Pair:
    """Returns the predictions for the images that both have.

    Raises:
        UserError: there are none.
    """
    place = {path: row for row, path in enumerate(second.paths)}
    common = [row for row, path in enumerate(first.paths) if path in place]
    if not common:
        raise UserError(
            f"the two sets of predictions have no image in common: {first.paths[0]}, {second.paths[0]}. Paths are "
            f"compared as they are written"
        )
    others = [place[first.paths[row]] for row in common]
    left_out = len(first) + len(second) - 2 * len(common)
    return Pair(first.select(common), second.select(others), left_out)


def comparison_lines(pair: Pair, names: tuple[str, str], label_of: Callable[[str], Any]) -> Iterator[str]:
    """Yields the disagreements of two models, and a paired test where labels are known.

    Args:
        names: of the two models.
        label_of: the label or labels of an image by its path, for images whose labels are in neither set.

    Raises:
        UserError: the two sets have different labels for an image, or one is of several labels per image.
    """
    first, second, left_out = pair
    if first.multi_label != second.multi_label:
        raise UserError(
            f"{names[0] if first.multi_label else names[1]} has several labels per image, and the other one class: "
            f"they cannot be compared"
        )
    if left_out:
        yield f"{left_out:,} images are in one of the two sets alone, and are left out"
    given: list[Any] = []
    for path, one, other in zip(first.paths, first.given, second.given, strict=True):
        known = _same(path, one, other)
        given.append(label_of(path) if known is None else known)
    different = pair.disagreements()
    kind = "labels" if first.multi_label else "classes"
    yield f"{names[0]} and {names[1]} predict different {kind} for {len(different):,} of {len(first):,} images"
    for row in different[:_DISAGREEMENTS]:
        yield from _disagreement(first.paths[row], first.predicted[row], second.predicted[row], given[row])
    if len(different) > _DISAGREEMENTS:
        yield f"    and {len(different) - _DISAGREEMENTS:,} more"
    labelled = [row for row, label in enumerate(given) if label is not None]
    if not labelled:
        why = (
            ": compare with the directory of a run, or by lora_dist.predict with --labels_file"
            if first.multi_label
            else ", and the images' folders are not named after the predicted classes"
        )
        yield f"no paired test: no label is known{why}"
        return
    test_lines = _label_set_test_lines if first.multi_label else _test_lines
    yield from test_lines(first.select(labelled), second.select(labelled), [given[row] for row in labelled], names)


def _disagreement(path: str, one: Any, other: Any, given: Any) -> Iterator[str]:
    """A line; of several labels, a line for the image and one for the labels of each model."""
    label = f" (is {shown(given)})" if given is not None else ""
    if not isinstance(one, tuple):
        yield f"    {path}: {shown(one)}, {shown(other)}{label}"
        return
    for indent, text in (("    ", f"{path}{label}"), ("        ", shown(one)), ("        ", shown(other))):
        deeper = indent + "    "
        yield textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=deeper, break_long_words=False)


def shown(answer: Any) -> str:
    """A class, or the labels of an image, as text."""
    return (", ".join(answer) or "(none)") if isinstance(answer, tuple) else str(answer)


def _same(path: str, one: Any, other: Any) -> Any:
    if one is not None and other is not None and one != other:
        raise UserError(
            f"{path} has the label {shown(one)} in one set of predictions and {shown(other)} in the other one"
        )
    return one if one is not None else other


def _test_lines(first: Predictions, second: Predictions, given: Sequence[Any], names: tuple[str, str]) -> Iterator[str]:
    truth = np.array(given)
    right = [np.array(one.predicted, dtype=object) == truth for one in (first, second)]
    groups = _groups_of_either(first, second)
    found = compare(right[0], right[1], groups)
    test = "McNemar's exact test" if groups is None else "a permutation test of groups"
    yield f"{names[0]} and {names[1]} on {len(truth):,} labelled images:"
    yield f"    accuracy {_difference(found.first, found.second, found.interval)}"
    yield f"    only {names[0]} is right on {found.only_first:,}, only {names[1]} on {found.only_second:,}"
    yield f"p = {found.p_value:.4g} by {test}"


def _label_set_test_lines(
    first: Predictions, second: Predictions, given: Sequence[Any], names: tuple[str, str]
) -> Iterator[str]:
    labels = sorted({*_all_labels(first, second), *(name for some in given for name in some)})
    scores = [_scores(one, labels) for one in (first, second)]
    groups = _groups_of_either(first, second)
    found = compare_label_sets(
        (label_matrix(first.predicted, labels), label_matrix(second.predicted, labels)),
        label_matrix(given, labels),
        None if scores[0] is None or scores[1] is None else (scores[0], scores[1]),
        groups,
    )
    yield f"{names[0]} and {names[1]} on {len(given):,} labelled images:"
    for lacking in (name for name, score in zip(names, scores, strict=True) if score is None):
        yield f"    no mAP: {lacking} has no score of every label; rows of predict --top_k {len(labels)} have"
    for name, value in found.first.items():
        yield f"    {NAMES[name]} {_difference(value, found.second[name], found.intervals.get(name))}"
    units = "images" if groups is None else "groups"
    yield f"p = {found.p_value:.4g} by a permutation test of the micro F1, which exchanges the answers for {units}"


def _difference(first: float, second: float, interval: Interval | None) -> str:
    change = f" (95% interval {interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
    return f"{first:.4f} and {second:.4f}, a difference of {second - first:+.4f}{change}"
