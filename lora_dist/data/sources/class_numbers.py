"""Finds parquet files whose class numbers mean other classes than in the rest of their data set.

`datasets` reads all files of a data set with the class names of the first one, and does not compare them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features

from lora_dist.errors import UserError


def require_same_numbers(schema: pa.Schema, features: Features, file: str) -> None:
    """Raises `UserError` if a parquet file names the classes of a column in another order than `features`.

    Files of other programs than `datasets` have no names of classes.
    """
    declared = Features.from_arrow_schema(schema)
    for column in declared.keys() & features.keys():
        # A file may have fewer classes than the data set, and may name more that have no image.
        for number, (name, known) in enumerate(zip(_names(declared[column]), _names(features[column]), strict=False)):
            if name != known:
                raise UserError(
                    f"{file}: in column {column}, {number} is {name} in this file, and {known} in other files of the "
                    f"data set. Write all files with the same order of classes, for example "
                    f"Dataset.cast_column({column!r}, ClassLabel(names=…)) or all splits from one load_dataset"
                )


def require_same_numbers_in(files: Iterable[str], features: Features) -> None:
    """`require_same_numbers` for all of the files that are on this machine."""
    for file in files:
        if Path(file).is_file():
            require_same_numbers(pq.read_schema(file), features, file)


def _names(feature: Any) -> list[str]:
    """Class names of a column of classes, or of lists of classes; none of any other column."""
    inner = getattr(feature, "feature", feature)
    return list(inner.names or []) if isinstance(inner, ClassLabel) else []
