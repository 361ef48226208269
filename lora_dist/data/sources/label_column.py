"""Reads the label column of a table, with a class or a list of labels in each row, as an array (see `label_arrays`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, LargeList, List, Value

from lora_dist.data.sources.columns import (
    LABEL_NAMES,
    NAMED_ROWS,
    class_names,
    find_label_column,
    has_label,
    only,
    require_columns,
    require_image_column,
    require_label_column,
    require_labels,
)
from lora_dist.data.sources.label_cells import indicated_value, indicator_columns
from lora_dist.errors import UserError
from lora_dist.settings.fields import MULTI_LABEL, SINGLE_LABEL


class LabelReading(NamedTuple):
    """Functions that find and read the label column of a table, for one problem type.

    Attributes:
        find_column: finds the column among the features of a table.
        read: reads the labels of a table. Takes the table, its image column, its label column, and the source that
            errors name. Returns the class names in order, and for each row its name, or a tuple of its names.
        names_in: returns the distinct names in rows that were read.
        encode: returns the array of rows that were read; takes the index of each name.
    """

    find_column: Callable[[Mapping[str, Any]], str]
    read: Callable[[Dataset, str, str, str], tuple[list[str], list[Any]]]
    names_in: Callable[[Iterable[Any]], set[str]]
    encode: Callable[[Sequence[Any], Mapping[str, int]], np.ndarray]


def find_list_column(features: Mapping[str, Any]) -> str:
    """The only column that holds lists of labels; of several, the one called `label`, `labels` or `cls`.

    Raises `UserError` otherwise.
    """
    columns = [name for name, feature in features.items() if _label_of(feature) is not None]
    columns = [name for name in columns if name in LABEL_NAMES] or columns
    return only(columns, features, "lists of labels", "label_column_name")


def _label_of(feature: Any) -> Any:
    """The feature of one label in a column of lists; None for a column of anything else."""
    inner = feature.feature if isinstance(feature, List | LargeList) else None
    return inner if isinstance(inner, ClassLabel | Value) else None


def _read_classes(table: Dataset, image_column: str, label_column: str, source: str) -> tuple[list[str], list[Any]]:
    require_columns(table.features, image_column, label_column)
    values, feature = list(table[label_column]), table.features[label_column]
    require_labels(values, feature, label_column, source)
    names = class_names(feature, set(values))
    return list(names.values()), [names[value] for value in values]


def _read_lists(table: Dataset, image_column: str, label_column: str, source: str) -> tuple[list[str], list[Any]]:
    require_image_column(table.features, image_column)
    if label_column not in table.features and (columns := indicator_columns(label_column)):
        return columns, _read_indicators(table, columns, source)
    require_label_column(table.features, label_column)
    feature = _label_of(table.features[label_column])
    if feature is None:
        kind = type(table.features[label_column]).__name__
        raise UserError(
            f"column {label_column} holds {kind}, not a list of labels per sample; name several columns of 0 and 1 "
            f"with commas between them, or with one class per sample, remove --problem_type multi_label_classification"
        )
    rows = [tuple(values or ()) for values in table[label_column]]
    if _are_indicators(rows):
        raise UserError(
            f"{source}: column {label_column} has lists of 0 and 1, such as {list(rows[0])!r}, which do not name their "
            f"labels: make them lists of the labels that an image has, or a column of 0 and 1 for each label"
        )
    wrong = [row for row, values in enumerate(rows) if not all(has_label(value, feature) for value in values)]
    if wrong:
        some = ", ".join(f"row {row} ({list(rows[row])!r})" for row in wrong[:NAMED_ROWS])
        raise UserError(
            f"{source}: {len(wrong)} of {len(rows)} rows have a blank or unknown label in the list in column "
            f"{label_column}, counted from 0: {some}{' …' if len(wrong) > NAMED_ROWS else ''}. Correct these lists; an "
            f"image without a label has an empty one."
        )
    names = class_names(feature, set(chain.from_iterable(rows)))
    return list(names.values()), [tuple(names[value] for value in values) for values in rows]


def _are_indicators(rows: Sequence[tuple[Any, ...]]) -> bool:
    """Whether rows have a 0 or 1 for each label, in place of the labels: they have one length, and values repeat."""
    is_repeated = any(len(set(values)) < len(values) for values in rows)
    return is_repeated and len(set(map(len, rows))) == 1 and set(chain.from_iterable(rows)) <= {0, 1}


def _read_indicators(table: Dataset, names: Sequence[str], source: str) -> list[tuple[str, ...]]:
    """The labels of each row by its columns of 0 and 1, one for each label."""
    for name in names:
        require_label_column(table.features, name)
    if len(set(names)) < len(names):
        raise UserError("--label_column_name names a column twice")
    columns = {name: [indicated_value(value) for value in table[name]] for name in names}
    wrong = [(row, name) for name, values in columns.items() for row, value in enumerate(values) if value is None]
    if wrong:
        some = ", ".join(f"{name} of row {row} ({table[row][name]!r})" for row, name in wrong[:NAMED_ROWS])
        raise UserError(
            f"{source}: {len(wrong)} values are neither 0 nor 1, rows counted from 0: {some}"
            f"{' …' if len(wrong) > NAMED_ROWS else ''}"
        )
    return [tuple(name for name, values in columns.items() if values[row]) for row in range(len(table))]


def _encode_classes(rows: Sequence[str], index_of: Mapping[str, int]) -> np.ndarray:
    return np.fromiter((index_of[name] for name in rows), dtype=np.int64, count=len(rows))


def _encode_sets(rows: Sequence[tuple[str, ...]], index_of: Mapping[str, int]) -> np.ndarray:
    encoded = np.zeros((len(rows), len(index_of)), dtype=np.uint8)
    for row, names in enumerate(rows):
        encoded[row, [index_of[name] for name in names]] = 1
    return encoded


READINGS = {
    SINGLE_LABEL: LabelReading(find_label_column, _read_classes, set, _encode_classes),
    MULTI_LABEL: LabelReading(find_list_column, _read_lists, lambda rows: set(chain.from_iterable(rows)), _encode_sets),
}
"""By problem type."""
