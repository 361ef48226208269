"""Loads folders, Hub data sets and local files as two splits under one label map."""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, List, load_dataset, load_from_disk

from lora_dist import demo
from lora_dist.data.sampling.training_split import TrainingSplit
from lora_dist.data.sources.class_names import require_distinct, warn_of_similar
from lora_dist.data.sources.class_numbers import require_same_numbers_in
from lora_dist.data.sources.columns import find_image_column
from lora_dist.data.sources.datasets_cache import with_writable_cache
from lora_dist.data.sources.exclusions import absolute, read_exclusions
from lora_dist.data.sources.folders import VALIDATION_NAMES, read_class_folders
from lora_dist.data.sources.image_files import warn_of_ignored
from lora_dist.data.sources.label_arrays import classes_in
from lora_dist.data.sources.label_column import READINGS, LabelReading
from lora_dist.data.sources.labels_file import given_columns, grouped_split, read_labels_file
from lora_dist.data.sources.shards import load_alone, local_parquet_files, options_for, reading_data
from lora_dist.data.sources.slice_columns import named_slices, read_slices
from lora_dist.data.sources.split import Split, stratified_sample, stratified_split
from lora_dist.data.sources.stratified_folds import fold_numbers
from lora_dist.errors import UserError
from lora_dist.settings.fields import MULTI_LABEL, fold_and_count
from lora_dist.settings.train import DataSettings

logger = logging.getLogger(__name__)
MAX_NAMED_CLASSES = 10


@dataclass(frozen=True)
class ImageData:
    """The data of a run; `labels` are the class names, in the order of the class indices."""

    labels: list[str]
    train: TrainingSplit
    validation: Split
    test: Split | None = None
    fold: str | None = None

    def describe_splits(self) -> dict[str, Any]:
        """Of each split, as JSON values: the number of its samples, their digest, and their table rows or shards."""
        test = {"test": self.test.describe()} if self.test is not None else {}
        fold = {"fold": self.fold} if self.fold is not None else {}
        return {"train": self.train.describe(), "validation": self.validation.describe(), **test, **fold}


def load_data(settings: DataSettings, seed: int) -> ImageData:
    """Loads all splits and checks that they have the same classes; raises `UserError` for anything that is missing."""
    excluded = read_exclusions(settings.exclude) if settings.exclude else frozenset()
    if settings.labels_file:
        return _load_listed(settings, seed, excluded)
    reading = READINGS[settings.problem_type]
    tables = [_load_table(settings, "train", excluded)]
    column = settings.image_column_name or find_image_column(tables[0].features)
    labels, train = _labelled(reading, tables[0], column, settings.label_column_name, None, excluded)
    if settings.validation_dir or settings.validation_split:
        tables.append(_load_table(settings, "validation", excluded, labels))
    _warn_of_unused(excluded, settings, tables)
    if len(tables) > 1:
        _, validation = _labelled(reading, tables[1], column, settings.label_column_name, labels, excluded)
        validation = _with_slices(validation, tables[1], settings)
    else:
        _say_unused_split(settings, tables[0])
        train, validation = _held_out(_with_slices(train, tables[0], settings), settings, seed)
    return _checked(settings, labels, train, validation, load_test(settings, labels), seed)


def _say_unused_split(settings: DataSettings, table: Dataset) -> None:
    """Logs that a data set has a validation split which the settings do not name."""
    if settings.dataset_name is None or settings.fold:
        return
    listing = Path(settings.dataset_name) / "dataset_dict.json"
    splits = json.loads(listing.read_text(encoding="utf-8"))["splits"] if listing.is_file() else table.info.splits or ()
    used = {one.partition("[")[0].strip() for one in f"{settings.train_split}+{settings.test_split}".split("+")}
    unused = [name for name in splits if name.lower() in VALIDATION_NAMES and name not in used]
    if unused:
        text = "the data set has a split %s, which is not used: --validation_split %s validates on it"
        logger.info(text, unused[0], unused[0])


def _load_listed(settings: DataSettings, seed: int, excluded: frozenset[str]) -> ImageData:
    """Loads a folder with a file of labels; its columns of splits and groups decide what is held out."""
    assert settings.train_dir is not None
    assert settings.labels_file is not None
    reading = READINGS[settings.problem_type]
    multi_label = settings.problem_type == MULTI_LABEL
    folder = demo.local_path(settings.train_dir)
    columns = given_columns(settings)
    listed = read_labels_file(folder, settings.labels_file, columns, excluded, settings.slice_columns, multi_label)
    warn_of_ignored(settings.train_dir, listed.ignored)
    if not multi_label and (joined := next((name for name in listed.classes if ";" in name), None)):
        text = "classes have a semicolon, such as %s: if these are several labels, add --problem_type %s"
        logger.warning(text, joined, MULTI_LABEL)
    for split in ("validation", "test"):
        if split in listed.splits and getattr(settings, f"{split}_dir"):
            raise UserError(f"--{split}_dir and --labels_file {settings.labels_file} both name {split} images: use one")
    table = _table_of(listed.classes, listed.paths, listed.labels, excluded, multi_label)
    # `_table_of` leaves out files whose names cannot be in a table.
    place = {path: index for index, path in enumerate(listed.paths)}
    kept = np.array([place[path] for path in table["image"]], dtype=np.int64)
    labels, whole = _labelled(reading, table, "image", "label", None, excluded)
    rows = kept[whole.table_rows]
    splits, groups = np.array(listed.splits)[rows], np.array(listed.groups)[rows]
    if len(set(groups.tolist())) < len(groups):
        whole = replace(whole, groups=groups)
    whole = replace(whole, slices={name: named_slices(name, values)[rows] for name, values in listed.slices.items()})
    train = whole.select(np.flatnonzero(splits == "train"))
    test = whole.select(np.flatnonzero(splits == "test")) if "test" in listed.splits else None
    if settings.validation_dir:
        validation = _load_known(settings, "validation", excluded, labels)
    elif (splits == "validation").any():
        if settings.fold:
            raise UserError(
                f"--fold {settings.fold} and --labels_file {settings.labels_file} both choose the validation images: "
                f"remove one, or the validation images from the column of splits"
            )
        validation = whole.select(np.flatnonzero(splits == "validation"))
    else:
        train, validation = _held_out(train, settings, seed)
    return _checked(settings, labels, train, validation, load_test(settings, labels) if test is None else test, seed)


def _held_out(train: Split, settings: DataSettings, seed: int) -> tuple[Split, Split]:
    """Returns the training images without those that are held out, and the latter; groups stay whole."""
    groups = None if train.groups is None else train.groups.tolist()
    if groups is not None and len(set(groups)) == len(groups):
        groups = None
    if settings.fold:
        number, count = fold_and_count(settings.fold)
        numbers = fold_numbers(train.labels, groups, count, seed)
        kept, held_out = np.flatnonzero(numbers != number - 1), np.flatnonzero(numbers == number - 1)
        if not len(held_out):
            units = f"{len(train)} images" if groups is None else f"{len(set(groups))} groups"
            raise UserError(
                f"--fold {settings.fold}: no image is in this fold, because there are {units}: use fewer folds"
            )
    elif groups is None:
        kept, held_out = stratified_split(train.labels, settings.train_val_split, seed)
        reason = "no class has two images"
    else:
        kept, held_out = grouped_split(train.labels, groups, settings.train_val_split, seed)
        reason = f"each of the {len(set(groups))} groups has a class that no other group has"
    if len(train) and not len(held_out):
        raise UserError(
            f"no image can be held out for validation, because {reason}: add images, or name those to validate on with "
            f"--validation_dir, --validation_split or a column of splits"
        )
    if groups is not None:
        logger.info("each of the %d groups is held out as a whole, or not at all", len(set(groups)))
    return train.select(kept), train.select(held_out)


def _checked(
    settings: DataSettings, labels: list[str], train: Split, validation: Split, test: Split | None, seed: int
) -> ImageData:
    """Checks the splits, and selects the samples that the settings ask for."""
    if not len(train) or not len(validation):
        raise UserError(f"{len(train)} training and {len(validation)} validation images: both need some")
    check_classes(settings, labels, classes_in(train.labels), validation)
    train = _limited(train, labels, settings.max_train_samples, "max_train_samples", seed)
    validation = _limited(validation, labels, settings.max_eval_samples, "max_eval_samples", seed)
    return ImageData(labels, train, validation, test, settings.fold)


def load_validation(settings: DataSettings, seed: int, labels: Sequence[str]) -> Split:
    """Loads the validation split alone, with the class indices of `labels`, the label map of a trained model.

    Raises `UserError` as `load_data`, and for a class that is not in the label map.
    """
    if not settings.validation_dir and not settings.validation_split:
        data = load_data(settings, seed)
        if data.labels != list(labels):
            raise UserError(f"the data has the classes {data.labels}, and the model {list(labels)}")
        return data.validation
    # The list may name training files too, so unused names are no reason to warn.
    excluded = read_exclusions(settings.exclude) if settings.exclude else frozenset()
    split = _load_known(settings, "validation", excluded, labels)
    if not len(split):
        raise UserError("0 validation images: nothing to evaluate on")
    return _limited(split, labels, settings.max_eval_samples, "max_eval_samples", seed)


def load_test(settings: DataSettings, labels: Sequence[str]) -> Split | None:
    """Loads the test split alone, with the class indices of `labels`; None if there is none. Raises as `load_data`."""
    if not settings.test_dir and not settings.test_split:
        return None
    excluded = read_exclusions(settings.exclude) if settings.exclude else frozenset()
    split = _load_known(settings, "test", excluded, labels)
    if not len(split):
        raise UserError("0 test images: nothing to test on")
    return split


def _load_known(
    settings: DataSettings, name: Literal["validation", "test"], excluded: frozenset[str], labels: Sequence[str]
) -> Split:
    """Loads a split with the class indices of `labels`."""
    table = _load_table(settings, name, excluded, labels)
    # The names of columns that are set with a folder are those of --labels_file.
    is_folder = settings.dataset_name is None
    image_column = None if is_folder else settings.image_column_name
    label_column = None if is_folder else settings.label_column_name
    column = image_column or find_image_column(table.features)
    reading = READINGS[settings.problem_type]
    split = _labelled(reading, table, column, label_column, labels, excluded, name)[1]
    return _with_slices(split, table, settings)


def _with_slices(split: Split, table: Dataset, settings: DataSettings) -> Split:
    """Adds the values of --slice_columns to a split of a data set; a folder of classes has none."""
    if settings.dataset_name is None or not settings.slice_columns:
        return split
    found = read_slices(table, settings.slice_columns)
    return replace(split, slices={name: values[split.table_rows] for name, values in found.items()})


def _load_table(
    settings: DataSettings,
    name: Literal["train", "validation", "test"],
    excluded: frozenset[str],
    known: Sequence[str] = (),
) -> Dataset:
    directory: str | None = getattr(settings, f"{name}_dir")
    if directory is None:
        return load_split(settings, getattr(settings, f"{name}_split"))
    classes, paths, labels, ignored = read_class_folders(demo.local_path(directory), f"{name}_dir", known, excluded)
    warn_of_ignored(directory, ignored)
    return _table_of(classes, paths, labels, excluded)


def _table_of(
    classes: list[str], paths: list[str], labels: Sequence[Any], excluded: frozenset[str], multi_label: bool = False
) -> Dataset:
    """A table of files and their labels: a class of each, or with `multi_label` a list of classes."""
    # Arrow cannot hold file names that are not UTF-8.
    odd = {path for path in paths if not _is_utf8(path)}
    if found := sorted(path for path in odd if absolute(path) not in excluded):
        first = os.fsencode(found[0]).decode(errors="backslashreplace")
        raise UserError(
            f"{len(found)} file names are not UTF-8, the first is {first}: rename the files, or list them for --exclude"
        )
    kept = [index for index, path in enumerate(paths) if path not in odd]
    columns = {"image": [paths[index] for index in kept], "label": [labels[index] for index in kept]}
    feature: Any = List(ClassLabel(names=classes)) if multi_label else ClassLabel(names=classes)
    return Dataset.from_dict(columns).cast_column("label", feature)


def _is_utf8(path: str) -> bool:
    # Python keeps each other byte as half of a surrogate pair.
    return path.isascii() or not any("\ud800" <= character <= "\udfff" for character in path)


def load_split(settings: DataSettings, split: str) -> Dataset:
    """Loads a split of a data set of the Hub, of local files, or saved to disk; raises `UserError` if it cannot."""
    name = settings.dataset_name
    assert name is not None
    saved_to_disk = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if settings.streaming and not saved_to_disk:
        return load_alone(settings, split)
    with reading_data(name, split):
        if not saved_to_disk:
            files = local_parquet_files(settings)
            options = options_for(chain.from_iterable(files.values()))
            table = with_writable_cache(
                lambda cache: load_dataset(name, settings.dataset_config_name, split=split, cache_dir=cache, **options)
            )
            # A split may be a slice, or a sum of splits.
            for part in {part.partition("[")[0] for part in split.split("+")}:
                require_same_numbers_in(files.get(part, ()), table.features)
            return table
        saved = load_from_disk(name)
        if not isinstance(saved, DatasetDict):
            saved = DatasetDict({"train": saved})
        base, _, slice_ = split.partition("[")
        if base not in saved:
            raise UserError(f"{name} has no split {base!r}; it has {', '.join(saved)}")
        return _sliced(saved[base], slice_, split)


def _sliced(table: Dataset, slice_: str, split: str) -> Dataset:
    """Applies the `start:stop]` of a split such as `train[:5000]`."""
    if not slice_:
        return table
    start, colon, stop = slice_.removesuffix("]").partition(":")
    if not colon or not all(part == "" or part.lstrip("-").isdigit() for part in (start, stop)):
        raise UserError(f"{split}: a data set saved to disk takes slices of rows such as train[:5000]")
    return table.select(range(len(table))[slice(int(start) if start else None, int(stop) if stop else None)])


def _warn_of_unused(excluded: frozenset[str], settings: DataSettings, folders: Sequence[Dataset]) -> None:
    """Warns of paths on a list that are not in the data. A name that is not UTF-8 is never in a table."""
    if not excluded:
        return
    roots = [absolute(directory) for directory in (settings.train_dir, settings.validation_dir) if directory]
    unused = [
        path
        for path in excluded.difference(*map(_files, folders))
        if _is_utf8(path)
        and not (settings.test_dir and Path(path).is_relative_to(absolute(settings.test_dir)))
        and not (Path(path).is_dir() and any(Path(path).is_relative_to(root) for root in roots))
    ]
    if unused:
        text = "--exclude %s: %d of %d files are not in the data, the first is %s"
        logger.warning(text, settings.exclude, len(unused), len(excluded), min(unused))


def _files(folder: Dataset) -> list[str]:
    """Absolute paths of the images of a folder, by table row."""
    return [absolute(path) for path in folder["image"]]


def _labelled(
    reading: LabelReading,
    table: Dataset,
    image_column: str,
    label_column: str | None,
    known: Sequence[str] | None,
    excluded: frozenset[str],
    name: str = "validation",
) -> tuple[list[str], Split]:
    """The label map and the split; `known` labels override the label map.

    Excluded files stay in the table, so that `table_rows` shows which were excluded.
    """
    label_column = label_column or reading.find_column(table.features)
    # A field such as `json.label` becomes a column.
    whole = table if label_column in table.features or "." not in label_column else table.flatten()
    names, rows = reading.read(whole, image_column, label_column, f"split {table.split or 'train'}")
    table_rows = np.arange(len(rows))
    if excluded:
        table_rows = np.flatnonzero([file not in excluded for file in _files(table)])
    named = [rows[row] for row in table_rows]
    labels = list(known) if known is not None else names
    if rows and not labels:
        raise UserError(f"split {table.split or 'train'}: no image has a label in column {label_column}")
    index_of = {name: index for index, name in enumerate(labels)}
    unknown = sorted(reading.names_in(named) - index_of.keys())
    require_distinct([*labels, *unknown])
    if known is None:
        warn_of_similar(labels)
    if unknown:
        raise UserError(
            f"the {name} data has classes that the training data lacks: {', '.join(unknown)}. "
            f"Add training images of these classes, or remove them from the {name} data."
        )
    table = table.select_columns([image_column])
    if isinstance(table.features[image_column], Image) or (len(table) and isinstance(table[0][image_column], str)):
        table = table.cast_column(image_column, Image(decode=False))
    encoded = reading.encode(named, index_of)
    _say_unlabelled(encoded, table.split)
    return labels, Split(table, image_column, table_rows, encoded)


def _say_unlabelled(labels: np.ndarray, split: Any) -> None:
    """Logs how many images have none of several labels."""
    if labels.ndim == 2 and (unlabelled := int((labels.sum(axis=1) == 0).sum())):
        text = "%s%d of %d images have no label: they count as images that show none of the labels"
        logger.info(text, f"split {split}: " if split else "", unlabelled, len(labels))


def check_classes(settings: DataSettings, labels: Sequence[str], in_train: set[int], validation: Split) -> None:
    """Raises `UserError` if a split lacks classes of the other; warns of classes without a training image."""
    in_validation = classes_in(validation.labels)
    for part, absent in (("training", in_validation - in_train), ("validation", in_train - in_validation)):
        if absent and not settings.allow_missing_classes:
            raise UserError(
                f"classes without a single {part} image: {', '.join(labels[index] for index in sorted(absent))}. "
                f"Add some, or continue without them with --allow_missing_classes."
            )
    if empty := [label for index, label in enumerate(labels) if index not in in_train]:
        logger.warning("%d of %d classes have no training image: %s", len(empty), len(labels), _some(empty))
    if len(in_train) == 1 and validation.labels.ndim == 1:
        logger.warning("all training images are of one class, so there is nothing to classify")


def _limited(split: Split, labels: Sequence[str], limit: int | None, flag: str, seed: int) -> Split:
    """Selects at most `limit` samples, stratified by class; warns of classes that it leaves out."""
    if limit is None or limit >= len(split):
        return split
    limited = split.select(stratified_sample(split.labels, limit, seed))
    if absent := classes_in(split.labels) - classes_in(limited.labels):
        named = _some(labels[index] for index in sorted(absent))
        present = len(classes_in(split.labels))
        logger.warning("--%s %d leaves out %d of %d classes: %s", flag, limit, len(absent), present, named)
    return limited


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_NAMED_CLASSES]) + (" …" if len(names) > MAX_NAMED_CLASSES else "")
