"""A folder of images, with one sub-folder a class: which files are of which class."""

from pathlib import Path
from typing import NamedTuple

from lora_dist.data.pixels.images import is_image_name, leads_back, visible_files
from lora_dist.errors import UserError


class ClassFolders(NamedTuple):
    """What a folder holds.

    Attributes:
        classes: names of the class folders, sorted.
        paths: files of all classes, sorted by class and path, so that the order is the same on every machine.
        labels: class of each file, as a place in `classes`.
        ignored: files that are in no class folder, or not taken for images; hidden ones left out.
    """

    classes: list[str]
    paths: list[str]
    labels: list[int]
    ignored: list[str]


def read_class_folders(directory: str) -> ClassFolders:
    """Lists the images of a folder.

    Raises:
        UserError: there are no class folders, or no images in them; or a folder cannot be read.
    """
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
    paths: list[str] = []
    labels: list[int] = []
    ignored = [str(entry) for entry in visible if not entry.is_dir()]
    for index, name in enumerate(classes):
        if leads_back(root / name):
            raise UserError(f"{root / name} is a link to a folder that it stands in: remove it")
        for file in visible_files(root / name):
            if is_image_name(file):
                paths.append(file)
                labels.append(index)
            else:
                ignored.append(file)
    if not paths:
        raise UserError(f"{directory}: no images in its class folders ({', '.join(classes[:5])} …)")
    return ClassFolders(classes, paths, labels, ignored)
