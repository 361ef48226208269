"""A folder of images with one sub-folder for each class."""

from pathlib import Path
from typing import NamedTuple

from lora_dist.data.pixels.images import is_image_name, leads_back, visible_files
from lora_dist.errors import UserError


class ClassFolders(NamedTuple):
    """The content of a folder, in an order that is the same on every machine.

    Attributes:
        classes: names of the class folders, sorted.
        paths: image files, sorted by class and path.
        labels: class of each file as an index of `classes`.
        ignored: visible files outside the class folders, or without an image suffix.
    """

    classes: list[str]
    paths: list[str]
    labels: list[int]
    ignored: list[str]


def read_class_folders(directory: str) -> ClassFolders:
    """Lists the images of a folder; raises `UserError` if there are none, or a folder cannot be read."""
    root = Path(directory)
    try:
        visible = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
        classes = [entry.name for entry in visible if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; all of the data has to be readable") from error
    if not classes:
        raise UserError(
            f"{directory} has no class folders: put the images of each class into a sub-folder named after it, "
            f"such as {directory}/rose/1.jpg"
        )
    found = ClassFolders(classes, [], [], [str(entry) for entry in visible if not entry.is_dir()])
    for label, name in enumerate(classes):
        if leads_back(root / name):
            raise UserError(f"{root / name} is a link to one of its parent folders: remove it")
        for file in visible_files(root / name):
            if is_image_name(file):
                found.paths.append(file)
                found.labels.append(label)
            else:
                found.ignored.append(file)
    if not found.paths:
        raise UserError(f"{directory}: no images in its class folders ({', '.join(classes[:5])} …)")
    return found
