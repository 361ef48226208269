"""Whether files can be made in a place, and what it is called where they cannot."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_dist.errors import UserError


def require_writable(root: Path, flag: str = "--output_dir") -> None:
    """Raises a `UserError` that names the flag unless files can be made below a directory, there or not yet."""
    there = root.absolute()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise UserError(
            f"{flag} {root}: cannot write there ({error.strerror or error}); name a directory that is writable "
            f"from this machine"
        ) from error


@contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """What goes wrong on the disk in this block, such as that it is full, becomes a `UserError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"--{flag} {path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
