"""Finds the image and label columns of a data set, and names its classes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value

from lora_dist.data.sources.class_names import visible_name
from lora_dist.errors import UserError

LABEL_NAMES = ("label", "labels", "cls")
NAMED_ROWS = 10


def find_image_column(features: Mapping[str, Any]) -> str:
    """The column of type Image, or the one called `image`; raises `UserError` unless there is exactly one."""
    columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not columns and "image" in features:
        columns = ["image"]
    return only(columns, features, "images", "image_column_name")


def only(columns: Sequence[str], features: Mapping[str, Any], content: str, flag: str) -> str:
    """The only one of `columns`; raises `UserError`, which names the flag to choose one with, unless there is one."""
    if len(columns) != 1:
        found = "no column" if not columns else f"columns {', '.join(columns)}"
        raise UserError(f"{found} of {content} in the data set; name one with --{flag}: {', '.join(features)}")
    return columns[0]


def holds_files(table: Dataset, column: str) -> bool:
    """Whether the images of a column are files, inside or outside the table, and not arrays of numbers."""
    return pa.types.is_struct(table.data.schema.field(column).type)


def files_of(table: Dataset, column: str) -> Iterator[tuple[str | None, int | None]]:
    """Yields the path of each file, and its size in bytes inside the table; None for a file outside the table."""
    for batch in table.with_format("arrow").iter(1000):
        cells = batch[column]
        lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
        yield from zip(pc.struct_field(cells, "path").to_pylist(), lengths, strict=True)


def find_label_column(features: Mapping[str, Any]) -> str:
    """The only column that is a ClassLabel or called `label`, `labels` or `cls` (WebDataset).

    Of several, `label` if it is a ClassLabel. Raises `UserError` otherwise.
    """
    columns = [name for name, feature in features.items() if isinstance(feature, ClassLabel) or name in LABEL_NAMES]
    if isinstance(features.get("label"), ClassLabel):
        columns = ["label"]
    return only(columns, features, "labels", "label_column_name")


def require_column(features: Mapping[str, Any], column: str, flag: str) -> None:
    """Raises `UserError`, which names the flag that asks for the column, unless the column exists."""
    if column not in features:
        raise UserError(f"--{flag} {column}: the data set has {', '.join(features)}")


def require_image_column(features: Mapping[str, Any], column: str) -> None:
    """Raises `UserError` unless the column exists."""
    require_column(features, column, "image_column_name")


def require_columns(features: Mapping[str, Any], image_column: str, label_column: str) -> None:
    """Raises `UserError` unless both columns exist and the second holds one label per sample."""
    require_image_column(features, image_column)
    require_column(features, label_column, "label_column_name")
    feature = features[label_column]
    if not isinstance(feature, ClassLabel | Value):
        raise UserError(
            f"column {label_column} holds {type(feature).__name__}, not one label per sample; "
            f"name another with --label_column_name: {', '.join(features)}"
        )


def has_label(value: Any, feature: Any) -> bool:
    """Whether a value is a usable label: False for None, NaN, NaT, blank text, -1, and an index outside the classes."""
    if isinstance(value, str):
        return bool(visible_name(value))
    # NaN and NaT differ from themselves.
    if value is None or value != value or value == -1:
        return False
    return not isinstance(feature, ClassLabel) or 0 <= value < len(feature.names)


def require_labels(values: Sequence[Any], feature: Any, column: str, source: str) -> None:
    """Raises `UserError` with the numbers of the rows without a label, or for labels that are no numbers or text.

    `source` is the file or split that the rows are from.
    """
    rows = [row for row, value in enumerate(values) if not has_label(value, feature)]
    if rows:
        some = ", ".join(f"row {row} ({values[row]!r})" for row in rows[:NAMED_ROWS])
        raise UserError(
            f"{source}: {len(rows)} of {len(values)} rows have no label in column {column}, counted from 0: {some}"
            f"{' …' if len(rows) > NAMED_ROWS else ''}. Label these rows, or remove them from the data set."
        )
    odd = next((row for row, value in enumerate(values) if not isinstance(value, int | float | str)), None)
    if odd is not None:
        kind = type(values[odd]).__name__
        raise UserError(
            f"{source}: row {odd} has a label of type {kind} in column {column}: write text or whole numbers"
        )


def class_names(feature: Any, values: set[Any]) -> dict[Any, str]:
    """Class name of each label value, in class order: the order of a ClassLabel `feature`, else sorted `values`."""
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    return {value: str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))}
