"""A folder of images, with one sub-folder a class: which files are of which class."""

from pathlib import Path
from typing import NamedTuple

from lora_dist.errors import UserError
from lora_dist.images import image_files


class ClassFolders(NamedTuple):
    """What a folder holds.

    Attributes:
        classes: names of the class folders, sorted.
        paths: files of all classes, sorted by class and path, so that the order is the same on every machine.
        labels: class of each file, as a place in `classes`.
    """

    classes: list[str]
    paths: list[str]
    labels: list[int]


def read_class_folders(directory: str) -> ClassFolders:
    """Lists the images of a folder.

    Raises:
        UserError: there are no class folders, or no images in them.
    """
    root = Path(directory)
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(
            f"{directory} has no class folders: put the images of each class into a sub-folder named after it, "
            f"such as {directory}/rose/1.jpg"
        )
    paths: list[str] = []
    labels: list[int] = []
    for place, name in enumerate(classes):
        found = list(image_files(root / name))
        paths += found
        labels += [place] * len(found)
    if not paths:
        raise UserError(f"{directory}: no images in its class folders ({', '.join(classes[:5])} …)")
    return ClassFolders(classes, paths, labels)
