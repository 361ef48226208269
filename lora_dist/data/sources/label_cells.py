"""Several labels per image in a table or a file: in one cell with a separator, or in a column of 0 and 1 per label."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_dist.data.sources.class_names import visible_name
from lora_dist.errors import UserError

_VALUES = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""Meaning of the cells of a column of 0 and 1, in lower case."""


def delimiter_of(lines: Sequence[str], multi_label: bool) -> str:
    """The delimiter of a file: comma, semicolon or tab. With `multi_label`, a semicolon may separate labels."""
    counts = {mark: min((line.count(mark) for line in lines), default=0) for mark in ",;\t"}
    if multi_label and (counts[","] or counts["\t"]):
        del counts[";"]
    return max(counts, key=counts.__getitem__)


def labels_in(cell: str, delimiter: str) -> tuple[str, ...]:
    """The labels of a cell, sorted: separated by semicolons, or by `|` in a file whose delimiter is the semicolon."""
    parts = (part.strip() for part in cell.split("|" if delimiter == ";" else ";"))
    return tuple(sorted({part for part in parts if visible_name(part)}))


def indicator_columns(label_column: str | None) -> list[str]:
    """The columns of 0 and 1 that a setting names with commas; none if it names one column, which has all labels."""
    names = [name.strip() for name in (label_column or "").split(",") if name.strip()]
    return names if len(names) > 1 else []


def is_indicator(sets: Collection[tuple[str, ...]]) -> bool:
    """Whether each image has a single 0 or 1, so that the column says of one label whether an image has it."""
    return all(len(labels) == 1 and labels[0].lower() in _VALUES for labels in sets)


def indicated_value(value: Any) -> bool | None:
    """Whether a value of a column of 0 and 1 says that the image has the label; None if it is neither."""
    return _VALUES.get(str(value).lower())


def places_of(names: Sequence[str], header: Sequence[str], where: str) -> dict[str, int]:
    """Column number of each name in the header; raises `UserError` for those that it lacks."""
    if missing := [name for name in names if name not in header]:
        raise UserError(f"{where}: no column {', '.join(missing)}; the first line has {', '.join(header)}")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: --label_column_name names a column twice")
    return {name: header.index(name) for name in names}


def indicated(cells: Sequence[str], places: Mapping[str, int]) -> tuple[tuple[str, ...], list[str]]:
    """The labels whose columns have a 1, and the columns that have neither 0 nor 1."""
    values = {name: cells[place] if place < len(cells) else "" for name, place in places.items()}
    known = {name: indicated_value(cell) for name, cell in values.items()}
    wrong = [f"{name} is {values[name] or 'empty'}" for name, value in known.items() if value is None]
    return tuple(name for name, value in known.items() if value), wrong
