"""Labels of the images of a folder in a text file: path, label and optionally split and group of one image per line.

An image has one class, or with `multi_label` any number of labels: in one cell, with a mark between them, or in a
column of 0 and 1 for each label.
"""

import csv
import io
import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lora_dist.data.sources.class_names import require_distinct, visible_name
from lora_dist.data.sources.exclusions import absolute
from lora_dist.data.sources.folders import TEST_NAMES, TRAINING_NAMES, VALIDATION_NAMES
from lora_dist.data.sources.image_files import find_files
from lora_dist.data.sources.label_arrays import class_counts, with_unlabelled
from lora_dist.data.sources.label_cells import (
    delimiter_of,
    indicated,
    indicator_columns,
    is_indicator,
    labels_in,
    places_of,
)
from lora_dist.errors import UserError

logger = logging.getLogger(__name__)

FIELDS = ("path", "label", "split", "group")
"""The columns of a file without a header, in this order; the last two are optional."""
NAMES = {
    "path": (
        "path",
        "file_name",
        "filename",
        "file",
        "filepath",
        "file_path",
        "image",
        "image_path",
        "image_name",
        "image_id",
        "id",
    ),
    "label": ("label", "labels", "class", "class_name", "cls", "category", "target"),
    "split": ("split", "subset", "partition"),
    "group": ("group", "group_id", "patient", "patient_id"),
}
"""Names of columns in a header, in lower case, the first that is found."""
SPLITS = {
    name: split
    for names, split in ((TRAINING_NAMES, "train"), (VALIDATION_NAMES, "validation"), (TEST_NAMES, "test"))
    for name in names
}
MISSING = ("nan", "NaN", "<NA>", "#N/A")
"""Texts by which other programs mark a missing value."""
_DOUBTFUL = {"na", "n/a", "none", "null", "-nan"}
"""Further such texts, in lower case, which may also be the names of classes."""
_SHOWN = 3
_SHOWN_CHARACTERS = 80
_HEADER_HINT = " (if that is a header, name its columns with --image_column_name and --label_column_name)"
_INSPECTED_LINES = 20
"""Lines that have to contain the delimiter."""


class Listed(NamedTuple):
    """The images of a file of labels, in the order of the files of the folder.

    Attributes:
        classes: names of the classes, sorted.
        paths: image files.
        labels: class of each as an index of `classes`; with `multi_label`, a list of such indices.
        splits: `train`, `validation` or `test` of each.
        groups: group of each; without a column of groups, all different.
        ignored: files of the folder that are no images, without the file of labels.
        slices: value of each by column of `slice_columns`.
    """

    classes: list[str]
    paths: list[str]
    labels: list[Any]
    splits: list[str]
    groups: list[str]
    ignored: list[str]
    slices: Mapping[str, list[str]] = MappingProxyType({})


def given_columns(settings: Any) -> dict[str, str | None]:
    """Returns the names of columns in the settings of a command, by the names in `FIELDS`; None for those not set."""
    return {
        "path": settings.image_column_name,
        "label": settings.label_column_name,
        "split": settings.split_column_name,
        "group": settings.group_column_name,
    }


class _Row(NamedTuple):
    line: int
    path: str
    labels: tuple[str, ...]
    split: str
    group: str
    slices: tuple[str, ...] = ()


def read_labels_file(
    directory: str,
    file: str,
    columns: Mapping[str, str | None] | None = None,
    excluded: Collection[str] = (),
    slice_columns: Sequence[str] = (),
    multi_label: bool = False,
) -> Listed:
    """Reads the labels of the images of a folder.

    Args:
        directory: folder of images; the paths in the file are relative to it.
        file: text file with commas, semicolons or tabs.
        columns: names of columns that were given, by the names in `FIELDS`.
        excluded: absolute paths of folders to leave out.
        slice_columns: further columns to read.
        multi_label: whether an image has any number of labels, instead of one class.

    Raises:
        UserError: names all files that are missing, contradictions and lines without a label at once.
    """
    found = find_files(directory, excluded)
    problems: dict[str, list[str]] = defaultdict(list)
    names = indicator_columns((columns or {}).get("label")) if multi_label else []
    rows = list(_rows(file, columns or {}, slice_columns, multi_label, names, problems))
    notes: dict[str, list[str]] = defaultdict(list)
    chosen = _rows_by_path(rows, directory, found.images, excluded, multi_label, problems, notes)
    unlisted = [path for path in found.images if path not in chosen and absolute(path) not in excluded]
    notes["images that are not listed, and left out"] += unlisted
    splits = {path: SPLITS.get(row.split, "train") for path, row in chosen.items()}
    problems["groups in several splits"] += _torn_groups(chosen, splits)
    _tell(f"--labels_file {file}", problems, notes)
    if multi_label and not names and chosen and is_indicator([row.labels for row in chosen.values()]):
        raise UserError(
            f"--labels_file {file}: the column of labels has 0 and 1 only, which are no labels. Name a column of 0 and "
            f"1 for each label, such as --label_column_name cat,dog"
        )
    if multi_label and not names and len(chosen) > 1 and all(len(row.labels) < 2 for row in chosen.values()):
        some = next((label for row in chosen.values() for label in row.labels), "")
        text = "--labels_file %s: no image has more than one label (such as %s); a semicolon separates labels in a cell"
        logger.warning(text, file, some)
    classes = names or sorted({label for row in chosen.values() for label in row.labels})
    require_distinct(classes)
    paths = [path for path in found.images if path in chosen]
    if not paths:
        raise UserError(f"--labels_file {file}: it lists no image of {directory}")
    number = {name: index for index, name in enumerate(classes)}
    numbered = [[number[label] for label in chosen[path].labels] for path in paths]
    return Listed(
        classes,
        paths,
        [numbers if multi_label else numbers[0] for numbers in numbered],
        [splits[path] for path in paths],
        [chosen[path].group or path for path in paths],
        [path for path in found.ignored if absolute(path) != absolute(file)],
        {name: [chosen[path].slices[place] for path in paths] for place, name in enumerate(slice_columns)},
    )


def _rows_by_path(
    rows: Sequence[_Row],
    directory: str,
    images: Sequence[str],
    excluded: Collection[str],
    multi_label: bool,
    problems: dict[str, list[str]],
    notes: dict[str, list[str]],
) -> dict[str, _Row]:
    """Returns the row of each listed image. Adds what is wrong with the other rows to `problems` and `notes`."""
    path_of = _Finder(directory, images)
    chosen: dict[str, _Row] = {}
    for row in rows:
        path = path_of(row.path)
        if path is None and (several_files := path_of.alike(row.path)):
            named = ", ".join(map(os.path.basename, several_files[:_SHOWN]))
            problems["names of several files (add the suffix)"].append(f"line {row.line}: {row.path} is {named}")
            continue
        if path is None:
            if not _is_excluded(os.path.join(directory, row.path), excluded):
                hint = _HEADER_HINT if row.line == 1 else ""
                problems["files that do not exist"].append(f"line {row.line}: {row.path[:_SHOWN_CHARACTERS]}{hint}")
            continue
        if not row.labels and not multi_label:
            problems["lines without a label (see --problem_type)"].append(f"line {row.line}: {row.path}")
        if doubtful := [label for label in row.labels if label.lower() in _DOUBTFUL]:
            notes["labels that are classes, unless you empty their cells"].append(f"line {row.line}: {doubtful[0]}")
        if row.split not in ("", *SPLITS):
            problems["unknown splits; they are train, validation and test"].append(f"line {row.line}: {row.split}")
        if path not in chosen:
            chosen[path] = row
        elif chosen[path][2:] == row[2:]:
            notes["files listed twice"].append(f"line {row.line}: {row.path}")
        else:
            named = f"lines {chosen[path].line} and {row.line}: {row.path}"
            problems["files listed twice with different values"].append(named)
    return chosen


def _rows(
    file: str,
    columns: Mapping[str, str | None],
    slice_columns: Sequence[str],
    multi_label: bool,
    names: Sequence[str],
    problems: dict[str, list[str]],
) -> Iterator[_Row]:
    """The rows of a file, with the number of their line; `names` are its columns of 0 and 1, one for each label."""
    where = f"--labels_file {file}"
    if Path(file).suffix.lower() in (".json", ".jsonl", ".parquet"):
        raise UserError(
            f"{where}: JSON and parquet are not read; write a CSV with the columns path and label. An image folder of "
            f"`datasets` is --dataset_name FOLDER, without --train_dir"
        )
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not a text file in UTF-8; save the table as CSV in UTF-8") from error
    some = [line for line in text.splitlines()[:_INSPECTED_LINES] if line.strip()]
    delimiter = delimiter_of(some, multi_label)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num}: {error}; is a quote before it not closed?") from error
    if not lines:
        raise UserError(f"{where}: the file is empty")
    header = lines[0][1]
    indicators = places_of(names, header, where)
    places, has_header = _places(header, {**columns, "label": names[0]} if names else columns, where)
    if missing := [name for name in slice_columns if not has_header or name not in header]:
        raise UserError(f"{where}: no column {missing[0]} of --slice_columns; the first line has {', '.join(header)}")
    sliced = [header.index(name) for name in slice_columns]
    for line, cells in lines[has_header:]:
        known = ["" if cell in MISSING and place != places["path"] else cell for place, cell in enumerate(cells)]
        values = {name: known[place] if place < len(known) else "" for name, place in places.items()}
        slices = tuple(known[place] if place < len(known) else "" for place in sliced)
        if names:
            labels, wrong = indicated(cells, indicators)
            problems["cells that are neither 0 nor 1"] += [f"line {line}: {one}" for one in wrong]
        elif multi_label:
            labels = labels_in(values["label"], delimiter)
        else:
            labels = (values["label"],) if visible_name(values["label"]) else ()
        yield _Row(line, values["path"], labels, values.get("split", "").lower(), values.get("group", ""), slices)


def _places(first: Sequence[str], columns: Mapping[str, str | None], where: str) -> tuple[dict[str, int], bool]:
    """Column number of each field, and whether the first line is a header."""
    lower = [name.lower() for name in first]
    places: dict[str, int] = {}
    for name in FIELDS:
        wanted = columns.get(name)
        if wanted is not None:
            if wanted not in first:
                raise UserError(f"{where}: no column {wanted}; the first line has {', '.join(first)}")
            places[name] = first.index(wanted)
            continue
        usual = [other for other in NAMES[name] if other in lower]
        place = lower.index(usual[0]) if usual else None
        if place is not None and place not in places.values():
            places[name] = place
            if name == "label" and len(usual) > 1:
                text = "%s: the labels are those of column %s, not of %s; --label_column_name names another column"
                logger.warning(text, where, usual[0], " or ".join(usual[1:]))
    if {"path", "label"} <= places.keys():
        return places, True
    if any(columns.values()):
        missing = " and ".join(f"{name}s" for name in FIELDS[:2] if name not in places)
        raise UserError(
            f"{where}: no column of {missing} found; name it with --image_column_name or --label_column_name: "
            f"{', '.join(first)}"
        )
    if not 2 <= len(first) <= len(FIELDS):
        raise UserError(
            f"{where}: expected path,label[,split[,group]], or a header; name the columns of the header with "
            f"--image_column_name and --label_column_name. The first line has {', '.join(first)}"
        )
    return {name: place for place, name in enumerate(FIELDS[: len(first)])}, False


class _Finder:
    """Finds the image that a path in the file means: relative to the folder, or absolute by whichever links.

    A path may lack the suffix, and may have composed accents in place of others, if only one image has such a name.
    """

    def __init__(self, directory: str, images: Iterable[str]) -> None:
        self._directory = directory
        self._resolved = os.path.realpath(directory)
        self._images = {absolute(path): path for path in images}
        self._like: dict[str, list[str]] = defaultdict(list)
        for known, path in self._images.items():
            stem = os.path.splitext(known)[0]
            for form in {stem, *(() if known.isascii() else map(_composed, (known, stem)))}:
                self._like[form].append(path)

    def __call__(self, path: str) -> str | None:
        for form in (path, path.replace("\\", "/")):
            known = absolute(os.path.join(self._directory, form))
            if found := self._image(known) or self._image(self._in_directory(known)):
                return found
        return None

    def alike(self, path: str) -> list[str]:
        """The images whose names differ from a path in their suffix or in the form of accents only."""
        return self._like.get(_composed(absolute(os.path.join(self._directory, path))), [])

    def _image(self, known: str) -> str | None:
        if found := self._images.get(known):
            return found
        like = self._like.get(known) or self._like.get(_composed(known), [])
        return like[0] if len(like) == 1 else None

    def _in_directory(self, known: str) -> str:
        """The path below the folder as it was named, of a file that other links lead to."""
        parent = os.path.relpath(os.path.realpath(os.path.dirname(known)), self._resolved)  # noqa: PTH120
        return absolute(os.path.join(self._directory, parent, os.path.basename(known)))


def _composed(path: str) -> str:
    """A path with each accent in one character with its letter; macOS and some archives have two."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)


def _is_excluded(path: str, excluded: Collection[str]) -> bool:
    known = absolute(path)
    return known in excluded or any(str(parent) in excluded for parent in PurePath(known).parents)


def _torn_groups(chosen: Mapping[str, _Row], splits: Mapping[str, str]) -> list[str]:
    splits_of = defaultdict(set)
    for path, row in chosen.items():
        if row.group:
            splits_of[row.group].add(splits[path])
    return [f"{group}: {', '.join(sorted(found))}" for group, found in splits_of.items() if len(found) > 1]


def _tell(where: str, problems: Mapping[str, list[str]], notes: Mapping[str, list[str]]) -> None:
    """Raises `UserError` if there are problems, else warns of notes; both name all kinds."""
    lines = [
        f"{kind}: {len(some):,}, e.g. {'; '.join(some[:_SHOWN])}"
        for kind, some in [*problems.items(), *notes.items()]
        if some
    ]
    if any(problems.values()):
        raise UserError("\n  ".join([f"{where}:", *lines]))
    if lines:
        logger.warning("%s: %s", where, "; ".join(lines))


def grouped_split(
    labels: np.ndarray, groups: Sequence[str], fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out whole groups, with about `fraction` of each class, small classes first.

    A group is held out only if each of its classes keeps a sample in another group. Returns the indices to keep and the
    indices held out, both ascending. `labels` has the class of each sample, or a row of its labels.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    names = sorted(members)
    order = [names[place] for place in np.random.default_rng([seed, len(names)]).permutation(len(names))]
    labels = with_unlabelled(labels)
    total = class_counts(labels, 0)
    counts = {group: class_counts(labels[members[group]], len(total)) for group in order}
    held = np.zeros_like(total)
    wanted = np.maximum(np.round(fraction * total), 1)
    chosen: set[str] = set()
    for label in np.argsort(total, kind="stable").tolist():
        for is_filling in (True, False):
            # Where every group is larger than the fraction, the smallest is held out.
            having = [group for group in order if counts[group][label] and group not in chosen]
            for group in having if is_filling else sorted(having, key=lambda one: counts[one].sum()):
                after, own = held + counts[group], counts[group] > 0
                fits = after[label] <= wanted[label] if is_filling else not held[label]
                if fits and (after[own] < total[own]).all():
                    chosen.add(group)
                    held = after
    is_held = np.array([group in chosen for group in groups], dtype=bool)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
