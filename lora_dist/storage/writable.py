"""Whether files can be made in a place, and what it is called where they cannot."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_dist.errors import UserError


def require_writable(root: Path, flag: str = "--output_dir") -> None:
    """Raises a `UserError` that names the flag unless files can be made below a directory, there or not yet."""
    try:
        there = standing(root)
        for part in root.absolute().relative_to(there).parts:
            # Whether it could be: a name can be too long.
            _is_there(there / part)
        with tempfile.TemporaryFile(dir=there):
            return
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"{flag} {root}: cannot write there ({why}); name a directory that is writable from this machine"
        ) from error


def standing(root: Path) -> Path:
    """A directory that need not be there yet, or else the nearest one above it that is."""
    there = root.absolute()
    while not _is_there(there):
        there = there.parent
    return there


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """What goes wrong on the disk in this block, such as that it is full, becomes a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--{flag} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
