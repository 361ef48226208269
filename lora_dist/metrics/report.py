"""Predictions against labels, and two sets of predictions against each other, as lines of text."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_dist.errors import UserError
from lora_dist.metrics.intervals import accuracy_and_macro_f1, bootstrap_intervals, with_interval
from lora_dist.metrics.paired import compare
from lora_dist.metrics.predictions import Predictions

MOST_CLASSES = 100
"""Most classes in the report by class."""
MATRIX_CLASSES = 20
"""Most classes whose whole confusion matrix is printed; of more, the most frequent confusions are."""
_CONFUSIONS = 20
_DISAGREEMENTS = 20


def evaluation_lines(predictions: Predictions) -> Iterator[str]:
    """Yields accuracy and macro F1 with intervals, the report by class and the confusion matrix of labelled images."""
    names = sorted({name for name in (*predictions.given, *predictions.predicted) if name is not None})
    number = {name: index for index, name in enumerate(names)}
    true = np.array([number[name] for name in predictions.given if name is not None])
    predicted = np.array([-1 if name is None else number[name] for name in predictions.predicted])
    values = accuracy_and_macro_f1(np.ones((1, len(true))), true, predicted)[:, 0]
    intervals = bootstrap_intervals(true, predicted, groups_of(predictions))
    accuracy, macro_f1 = (
        with_interval(float(value), intervals.get(name))
        for name, value in zip(("accuracy", "macro_f1"), values, strict=True)
    )
    yield f"{len(true):,} images: accuracy {accuracy}, macro F1 {macro_f1}"
    matrix = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    np.add.at(matrix, (true, predicted), 1)
    yield from _class_lines(names, matrix)
    yield from _confusion_lines(names, matrix)


def _class_lines(names: Sequence[str], matrix: np.ndarray) -> Iterator[str]:
    """Precision, recall and F1 of each class; the last column of the matrix counts images without a prediction."""
    hits, support, claimed = np.diag(matrix), matrix.sum(axis=1), matrix[:, :-1].sum(axis=0)
    rows = [["class", "precision", "recall", "F1", "images"]]
    for index, name in enumerate(names[:MOST_CLASSES]):
        shares = (hits / np.maximum(claimed, 1), hits / np.maximum(support, 1), 2 * hits / (support + claimed))
        rows.append([name, *(f"{values[index]:.3f}" for values in shares), str(support[index])])
    yield ""
    yield from _aligned(rows)
    if len(names) > MOST_CLASSES:
        yield f"… and {len(names) - MOST_CLASSES:,} more classes"


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


def comparison_lines(pair: Pair, names: tuple[str, str], label_of: Callable[[str], str | None]) -> Iterator[str]:
    """Yields the disagreements of two models, and a paired test where labels are known.

    Args:
        names: of the two models.
        label_of: the label of an image by its path, for images whose label is in neither set.

    Raises:
        UserError: the two sets have different labels for an image.
    """
    first, second, left_out = pair
    if left_out:
        yield f"{left_out:,} images are in one of the two sets alone, and are left out"
    given = [
        _same(path, one, other) or label_of(path)
        for path, one, other in zip(first.paths, first.given, second.given, strict=True)
    ]
    different = pair.disagreements()
    yield f"{names[0]} and {names[1]} predict different classes for {len(different):,} of {len(first):,} images"
    for row in different[:_DISAGREEMENTS]:
        label = f" (is {given[row]})" if given[row] is not None else ""
        yield f"    {first.paths[row]}: {first.predicted[row]}, {second.predicted[row]}{label}"
    if len(different) > _DISAGREEMENTS:
        yield f"    and {len(different) - _DISAGREEMENTS:,} more"
    labelled = [row for row, label in enumerate(given) if label is not None]
    if not labelled:
        yield "no paired test: no label is known, and the images' folders are not named after the predicted classes"
        return
    yield from _test_lines(first.select(labelled), second.select(labelled), [given[row] for row in labelled], names)


def _same(path: str, one: str | None, other: str | None) -> str | None:
    if one is not None and other is not None and one != other:
        raise UserError(f"{path} has the label {one} in one set of predictions and {other} in the other one")
    return one if one is not None else other


def _test_lines(
    first: Predictions, second: Predictions, given: Sequence[str | None], names: tuple[str, str]
) -> Iterator[str]:
    truth = np.array(given)
    right = [np.array(one.predicted, dtype=object) == truth for one in (first, second)]
    groups = groups_of(first)
    found = compare(right[0], right[1], groups)
    test = "McNemar's exact test" if groups is None else "a permutation test of groups"
    change = f" (95% interval {found.interval[0]:+.4f} to {found.interval[1]:+.4f})" if found.interval else ""
    yield (
        f"accuracy on {len(truth):,} labelled images: {found.first:.4f} and {found.second:.4f}, a difference of "
        f"{found.second - found.first:+.4f}{change}"
    )
    yield (
        f"only {names[0]} is right on {found.only_first:,}, only {names[1]} on {found.only_second:,}: "
        f"p = {found.p_value:.4g} by {test}"
    )
