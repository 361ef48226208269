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
    if not columns:
        columns = _called(features, ("image",))
    return only(columns, features, "images", "image_column_name")


def _called(features: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The columns of these names, or else those of the same names in other case, such as CLS in a tar file."""
    exact = [column for column in features if column in names]
    return exact or [column for column in features if column.lower() in names]


def only(columns: Sequence[str], features: Mapping[str, Any], content: str, flag: str) -> str:
    """Returns the only one of `columns`.

    Raises:
        UserError: there is none, or there are several; the message names the flag to choose one with.
    """
    if len(columns) != 1:
        found = "no column" if not columns else f"columns {', '.join(columns)}"
        raise UserError(f"{found} of {content} in the data set; name one with --{flag}: {listed(features)}")
    return columns[0]


def listed(features: Mapping[str, Any]) -> str:
    """All column names, for an error message; a column with fields is listed as its fields, such as `json.label`."""
    fields = {name: list(feature) if isinstance(feature, dict) else [] for name, feature in features.items()}
    return ", ".join(
        chosen for name, inner in fields.items() for chosen in ([f"{name}.{one}" for one in inner] or [name])
    )


def path_of(features: Mapping[str, Any], column: str) -> list[str]:
    """The column, and the fields in it that lead to the one that `column` names, such as `json.label` in a tar file."""
    first, *fields = column.split(".")
    return [first, *fields] if column not in features and isinstance(features.get(first), dict) else [column]


def feature_of(features: Mapping[str, Any], column: str) -> Any:
    """The feature of a column or of a field of one; None if there is no such column."""
    found: Any = features
    for name in path_of(features, column):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def field_of(value: Any, fields: Sequence[str]) -> Any:
    """The field of a cell that the names lead to; None if the cell does not have it."""
    for name in fields:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


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
    called = _called(features, LABEL_NAMES)
    columns = [name for name, feature in features.items() if isinstance(feature, ClassLabel) or name in called]
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


def require_label_column(features: Mapping[str, Any], column: str) -> None:
    """Raises `UserError` unless the column exists, or the field of a column that it names."""
    if feature_of(features, column) is None:
        raise UserError(f"--label_column_name {column}: the data set has {listed(features)}")


def require_columns(features: Mapping[str, Any], image_column: str, label_column: str) -> None:
    """Raises `UserError` unless both columns exist and the second holds one label per sample."""
    require_image_column(features, image_column)
    require_label_column(features, label_column)
    feature = feature_of(features, label_column)
    if not isinstance(feature, ClassLabel | Value):
        raise UserError(
            f"column {label_column} holds {type(feature).__name__}, not one label per sample; "
            f"name another with --label_column_name: {listed(features)}"
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
            f"{' …' if len(rows) > NAMED_ROWS else ''}. Label these rows, or remove them from the data set. If "
            f"images may have any number of labels, including none, add --problem_type multi_label_classification."
        )
    odd = next((row for row, value in enumerate(values) if not isinstance(value, int | float | str)), None)
    if odd is not None:
        kind = type(values[odd]).__name__
        raise UserError(
            f"{source}: row {odd} has a label of type {kind} in column {column}: write text or whole numbers"
        )


def class_names(feature: Any, values: set[Any]) -> dict[Any, str]:
    """Class name of each label value, in class order: the order of a ClassLabel `feature`, else sorted `values`.

    Values lose spaces and line breaks around them, such as the end of a .txt file, where this joins no classes.
    """
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
    names = {value: str(value).strip() for value in ordered}
    return names if len(set(names.values())) == len(names) else {value: str(value) for value in ordered}
