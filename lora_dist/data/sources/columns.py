"""Finds the image and label columns of a data set, and names its classes."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value

from lora_dist.errors import UserError


def find_image_column(features: Mapping[str, Any]) -> str:
    """The column of type Image, or the one called `image`; raises `UserError` unless there is exactly one."""
    columns = [name for name, feature in features.items() if isinstance(feature, Image)]
    if not columns and "image" in features:
        columns = ["image"]
    if len(columns) != 1:
        found = "no column" if not columns else f"columns {', '.join(columns)}"
        raise UserError(f"{found} of images in the data set; name one with --image_column_name: {', '.join(features)}")
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
    """The column of type ClassLabel, or the one called `label`, `labels` or `cls` (WebDataset), else `UserError`."""
    columns = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(columns) != 1:
        columns = [name for name in ("label", "labels", "cls") if name in features]
    if not columns:
        raise UserError(f"no column of labels; name one with --label_column_name: {', '.join(features)}")
    return columns[0]


def require_columns(features: Mapping[str, Any], image_column: str, label_column: str) -> None:
    """Raises `UserError` unless both columns exist and the second holds one label a sample."""
    for column, flag in ((image_column, "image_column_name"), (label_column, "label_column_name")):
        if column not in features:
            raise UserError(f"--{flag} {column}: the data set has {', '.join(features)}")
    feature = features[label_column]
    if not isinstance(feature, ClassLabel | Value):
        raise UserError(
            f"column {label_column} holds {type(feature).__name__}, and not one label a sample; "
            f"name another with --label_column_name: {', '.join(features)}"
        )


def class_names(feature: Any, values: set[Any]) -> dict[Any, str]:
    """Class name of each label value, in class order: the order of a ClassLabel `feature`, else sorted `values`."""
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    return {value: str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))}
