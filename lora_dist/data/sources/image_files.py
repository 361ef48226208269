"""Finds the image files below a folder, and says what it leaves out."""

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image

from lora_dist.data.pixels.formats import HEIC_ADVICE, HEIC_SUFFIXES, decoded_formats, has_image_content
from lora_dist.data.pixels.images import leads_back
from lora_dist.data.sources.exclusions import absolute
from lora_dist.errors import UserError

logger = logging.getLogger(__name__)

SYSTEM_FOLDERS = {
    name.lower()
    for name in (
        "__MACOSX", ".AppleDouble", ".ipynb_checkpoints", ".thumbnails", "lost+found", "System Volume Information",
        "$RECYCLE.BIN", "RECYCLER", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot",
    )
}  # fmt: skip
"""Folders that operating systems, network storage, archives and notebooks create, in lower case."""


class Found(NamedTuple):
    """Files below a folder, in an order that is the same on every machine.

    Attributes:
        images: files with a suffix that Pillow decodes, and files without a suffix whose content it decodes.
        ignored: other visible files, and folders in `SYSTEM_FOLDERS`.
    """

    images: list[str]
    ignored: list[str]


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of all formats that Pillow and its installed plug-ins decode, in lower case."""
    decoded = decoded_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in decoded)


def is_image_name(file: str) -> bool:
    """Whether a file name ends in one of `image_suffixes`, in any case."""
    return os.path.splitext(file)[1].lower() in image_suffixes()


def _is_image_without_suffix(path: str) -> bool:
    return not os.path.splitext(path)[1] and has_image_content(path)


def is_system_folder(name: str) -> bool:
    """Whether a folder has one of the names `SYSTEM_FOLDERS` or begins with `.Trash`, in any case."""
    return name.lower() in SYSTEM_FOLDERS or name.lower().startswith(".trash")


def find_files(directory: str | Path, excluded: Collection[str] = ()) -> Found:
    """Lists the files below a directory, without hidden ones and without folders whose absolute path is `excluded`.

    Raises `UserError` if a folder cannot be read.
    """
    found = Found([], [])
    for folder, folders, files in os.walk(directory, onerror=_refuse, followlinks=True):
        system = sorted(inner for inner in folders if is_system_folder(inner))
        found.ignored.extend(os.path.join(folder, inner) for inner in system)
        folders[:] = sorted(
            inner
            for inner in folders
            if not inner.startswith(".")
            and inner not in system
            and not leads_back(Path(folder, inner))
            and absolute(os.path.join(folder, inner)) not in excluded
        )
        for file in sorted(file for file in files if not file.startswith(".")):
            path = os.path.join(folder, file)
            (found.images if is_image_name(file) or _is_image_without_suffix(path) else found.ignored).append(path)
    return found


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}; all of the data has to be readable") from error


def by_kind(ignored: Iterable[str]) -> dict[str, list[str]]:
    """Groups what is left out by suffix, as `.heic files`; images among it are outside of class folders."""
    groups = defaultdict(list)
    for path in ignored:
        suffix = os.path.splitext(path)[1].lower()
        if is_system_folder(os.path.basename(path)):
            kind = "folders of the system or an archive"
        elif is_image_name(path) or _is_image_without_suffix(path):
            kind = "images outside of class folders"
        else:
            kind = f"{suffix} files" if suffix else "files without a suffix"
        groups[kind].append(path)
    return dict(sorted(groups.items()))


def warn_of_ignored(directory: str | Path, ignored: Iterable[str]) -> None:
    """Logs how many files of which suffix a folder has that are left out."""
    kinds = by_kind(ignored)
    if kinds:
        listed = "; ".join(f"{kind}: {len(paths):,}, e.g. {paths[0]}" for kind, paths in kinds.items())
        if any(kind.split(" ", maxsplit=1)[0] in HEIC_SUFFIXES for kind in kinds):
            listed += f". {HEIC_ADVICE}"
        logger.warning("%s: not read as images: %s", directory, listed)
