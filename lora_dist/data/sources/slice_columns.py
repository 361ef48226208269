"""Reads the columns of --slice_columns: metrics are computed for the images of each value."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from lora_dist.data.sources.columns import require_column
from lora_dist.errors import UserError

MAX_VALUES = 200
"""Largest number of values of a column of slices. A column with more holds names of images rather than groups."""
NO_VALUE = "(none)"


def read_slices(table: Dataset, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The values of each row of a table, shape [rows], by column.

    Raises:
        UserError: there is no such column, it does not hold one value per row, or it has too many.
    """
    found = {}
    for name in columns:
        require_column(table.features, name, "slice_columns")
        values, feature = list(table[name]), table.features[name]
        if any(isinstance(value, list | dict) for value in values):
            raise UserError(f"--slice_columns {name}: it does not hold one value per sample")
        if isinstance(feature, ClassLabel):
            values = [None if value is None or value < 0 else feature.names[value] for value in values]
        found[name] = named_slices(name, _whole(values))
    return found


def _whole(values: list[Any]) -> list[Any]:
    """The values as integers if they are whole numbers, which a table with missing values may hold as 1.0."""
    known = [value for value in values if value is not None and value == value]
    if not all(isinstance(value, float) and value.is_integer() for value in known):
        return values
    return [None if value is None or value != value else int(value) for value in values]


def _text(value: Any) -> str:
    # NaN and NaT differ from themselves.
    return "" if value is None or value != value else str(value).strip()


def named_slices(column: str, values: Sequence[Any]) -> np.ndarray:
    """The values of a column as text, shape [N]; raises `UserError` if they are too many."""
    texts = np.array([_text(value) or NO_VALUE for value in values])
    if (count := len(np.unique(texts))) > MAX_VALUES:
        raise UserError(f"--slice_columns {column}: it has {count:,} values; slices need at most {MAX_VALUES}")
    return texts
