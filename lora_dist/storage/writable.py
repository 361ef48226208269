"""Checks whether directories are writable, and turns write errors into `UserError`."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_dist.errors import UserError


def require_writable(root: Path, flag: str = "--output_dir") -> None:
    """Raises a `UserError` unless files can be created in a directory, which need not exist.

    Args:
        flag: Named in the message.
    """
    try:
        there = nearest_existing(root)
        for part in root.absolute().relative_to(there).parts:
            # Raises if the name is too long.
            _exists(there / part)
        with tempfile.TemporaryFile(dir=there) as file:
            # A full disk has room for an empty file.
            file.write(bytes(1))
            file.flush()
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(
            f"{flag} {root}: cannot write there ({why}); use a directory that is writable on this machine"
        ) from error


def nearest_existing(root: Path) -> Path:
    """Returns the directory, or its nearest parent that exists."""
    there = root.absolute()
    while not _exists(there):
        there = there.parent
    return there


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Turns disk errors in this block, e.g. a full disk, into a `UserError` that names the flag."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--{flag} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
