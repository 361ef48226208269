"""A folder of images with one sub-folder for each class."""

import logging
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lora_dist.data.pixels.images import leads_back
from lora_dist.data.sources.exclusions import absolute
from lora_dist.data.sources.image_files import find_files, is_image_name, is_system_folder
from lora_dist.errors import UserError

logger = logging.getLogger(__name__)

TRAINING_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")
VALIDATION_NAMES = ("val", "valid", "validation", "dev", "eval")
SHOWN_NAMES = 5
SPLIT_NAMES = {*TRAINING_NAMES, *VALIDATION_NAMES, *TEST_NAMES}


class ClassFolders(NamedTuple):
    """The content of a folder, in an order that is the same on every machine.

    Attributes:
        classes: names of the class folders, sorted.
        paths: image files, sorted by class and path.
        labels: class of each file as an index of `classes`.
        ignored: visible files outside the class folders or without an image suffix, and folders of the system.
    """

    classes: list[str]
    paths: list[str]
    labels: list[int]
    ignored: list[str]


def read_class_folders(
    directory: str, flag: str = "train_dir", known: Collection[str] = (), excluded: Collection[str] = ()
) -> ClassFolders:
    """Lists the images of a folder without `excluded` folders; excluded files are listed.

    Raises `UserError` if there are no images, or a folder cannot be read.

    Raises `UserError` as well if the class folders are one level deeper or more, and names the flags to use. Folders
    that are all named after `known` classes are not checked for this.
    """
    root = Path(directory)
    folders, others = _entries(root)
    folders = [folder for folder in folders if absolute(str(folder)) not in excluded]
    classes = [folder.name for folder in folders]
    if not classes:
        file = _label_list(others)
        advice = f", or name the file of their labels: --labels_file {file}" if file else ""
        if any(other.name in ("metadata.jsonl", "metadata.parquet") for other in others):
            advice = f", or use the labels of `datasets`: --dataset_name {directory}"
        raise UserError(
            f"{directory} has no class folders: put the images of each class into a sub-folder named after it, "
            f"such as {directory}/rose/1.jpg{advice}"
        )
    if not set(classes) <= set(known):
        _require_classes(root, folders, flag)
        _require_no_flat_splits(root, folders, others, flag)
        _warn_of_shared_folders(root, folders)
    found = ClassFolders(classes, [], [], list(map(str, others)))
    for label, folder in enumerate(folders):
        if leads_back(folder):
            raise UserError(f"{folder} is a link to one of its parent folders: remove it")
        images, ignored = find_files(folder, excluded)
        found.paths.extend(images)
        found.labels.extend([label] * len(images))
        found.ignored.extend(ignored)
    if not found.paths:
        raise UserError(f"{directory}: no images in its class folders ({', '.join(classes[:5])} …)")
    return found


def _entries(directory: Path) -> tuple[list[Path], list[Path]]:
    """Folders that may be classes, and what else is in a directory, sorted and without hidden files."""
    try:
        entries = sorted(directory.iterdir())
        folders = [entry for entry in entries if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; all of the data has to be readable") from error
    system = [folder for folder in folders if is_system_folder(folder.name)]
    files = [entry for entry in entries if not entry.name.startswith(".") and entry not in set(folders)]
    classes = [folder for folder in folders if not folder.name.startswith(".") and folder not in system]
    return classes, files + system


def _require_classes(root: Path, folders: list[Path], flag: str) -> None:
    """Raises `UserError` if the folders are splits, or a single folder around the class folders."""
    directory, inner = root, folders
    while len(inner) == 1 and _holds_classes(inner[0]):
        directory = inner[0]
        inner, _ = _entries(directory)
    names = {folder.name.lower(): folder for folder in inner}
    usual = {"train_dir": TRAINING_NAMES, "validation_dir": VALIDATION_NAMES, "test_dir": TEST_NAMES}
    right = {split: next((names[name] for name in known if name in names), None) for split, known in usual.items()}
    # The audit has no --test_dir.
    right = {name: right[name] for name in ((flag,) if flag != "train_dir" else ("train_dir", "validation_dir"))}
    wanted = right[flag]
    splits = [folder for name, folder in names.items() if name in SPLIT_NAMES and _holds_classes(folder)]
    within = [folder for folder in splits if len(inner) > 2 and _inner_names(folder) <= {one.name for one in inner}]
    if len(splits) > 1 or (splits == [wanted] and len(inner) > 1 and names.keys() <= SPLIT_NAMES):
        listed = ", ".join(folder.name for folder in inner if folder.name.lower() in SPLIT_NAMES)
        cause = f"its folders {listed} are splits, not classes"
    elif wanted and _holds_classes(wanted) and (beside := [one for one in inner if not _holds_classes(one)]):
        others = ", ".join(folder.name for folder in beside)
        cause, right = f"its folder {wanted.name} contains class folders; these do not: {others}", {flag: wanted}
    elif within:
        cause = f"its folder {within[0].name} is a split with the classes of the others, not a class"
        raise UserError(f"--{flag} {root}: {cause}; move it to another place, or list it for --exclude")
    elif directory != root:
        cause, right = f"its only folder {folders[0].name} contains the class folders", {flag: directory}
    else:
        return
    flags = " ".join(f"--{name} {folder}" for name, folder in right.items() if folder)
    advice = f"use {flags}" if right[flag] else f"set --{flag} to the folder with the class folders"
    raise UserError(f"--{flag} {root}: {cause}; {advice}")


def _require_no_flat_splits(root: Path, folders: list[Path], others: list[Path], flag: str) -> None:
    """Raises `UserError` if the folders are named as splits, and a file beside them may have the labels; else warns."""
    splits = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    if len(splits) < min(2, len(folders)):
        return
    named = ", ".join(folder.name for folder in splits)
    what = f"its folder {named} is named as a split" if len(splits) == 1 else f"its folders {named} are named as splits"
    if file := _label_list(others):
        folder = next((folder for folder in splits if folder.name.lower() in TRAINING_NAMES), splits[0])
        raise UserError(
            f"--{flag} {root}: {what}, not as classes; name the folder and the file of its labels: "
            f"--train_dir {folder} --labels_file {file}. Otherwise, move {file.name} to another place"
        )
    logger.warning("%s: %s; the names of folders are taken for classes", root, what)


def _label_list(files: list[Path]) -> Path | None:
    """The file among `files` that may list labels: a table, of several one that is named after training images."""
    tables = [file for file in files if file.suffix.lower() in (".csv", ".tsv")]
    return next((file for file in tables if "train" in file.name.lower()), tables[0] if tables else None)


def _warn_of_shared_folders(root: Path, folders: list[Path]) -> None:
    """Warns if all class folders contain folders of the same names, which may be the classes, or splits."""
    shared = _inner_names(folders[0])
    for folder in folders[1:]:
        if len(shared) > 1:
            shared &= _inner_names(folder)
    if len(folders) < 2 or len(shared) < 2:
        return
    named = ", ".join(sorted(shared)[:SHOWN_NAMES]) + (" …" if len(shared) > SHOWN_NAMES else "")
    text = "%s: each class folder (%s …) contains folders of the same names (%s), whose images count for the class. %s"
    if {name.lower() for name in shared} <= SPLIT_NAMES:
        advice = "If these are splits, move them outside the class folders, or list the images with --labels_file"
    else:
        advice = "If these are the classes, name one of the folders that contain them"
    logger.warning(text, root, folders[0].name, named, advice)


def _inner_names(folder: Path) -> set[str]:
    with suppress(OSError), os.scandir(folder) as entries:
        return {
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".") and not is_system_folder(entry.name)
        }
    return set()


def _holds_classes(folder: Path) -> bool:
    """Whether a folder has images in its sub-folders, and none directly in it."""
    if leads_back(folder):
        return False
    folders, others = _entries(folder)
    return not any(is_image_name(str(other)) for other in others) and any(
        find_files(inner).images for inner in folders if not leads_back(inner)
    )
