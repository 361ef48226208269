"""Atomic writing: files and directories appear complete or not at all, even if the process dies."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_WRITING, _REMOVING = ".writing-", ".removing-"


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yields a directory to write into, which replaces `final` at the end.

    Files are flushed to the disk before the rename, so that the old or the new directory survives a power failure.
    After an error the new files are removed, to free the space on a full disk.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(_WRITING + final.name)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir()
    try:
        yield aside
        _put_in_place(aside, final)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _put_in_place(aside: Path, final: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for file in aside.iterdir():
        # safetensors creates files that only their owner can read.
        file.chmod(0o666 & ~umask)
        _flush(file)
    _flush(aside)
    old = final.with_name(_REMOVING + final.name)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    aside.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacing(parent: Path) -> None:
    """Completes a replacement if the process was killed between the two renames.

    Several processes may call this at once.
    """
    for old in parent.glob(f"{_REMOVING}*"):
        final = parent / old.name.removeprefix(_REMOVING)
        aside = parent / (_WRITING + final.name)
        if not final.exists():
            # The new directory was complete before the old one was renamed. Without it, the old one was being removed.
            with suppress(OSError):
                aside.rename(final)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file; an existing one is replaced only by the complete new file."""
    aside = path.with_name(_WRITING + path.name)
    try:
        aside.write_bytes(content)
        _flush(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def replace_files(directory: Path) -> Iterator[Path]:
    """Yields a directory for new files, which replace those of the same names in `directory` at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_WRITING, dir=directory) as name:
        yield Path(name)
        for file in Path(name).iterdir():
            _flush(file)
            file.replace(directory / file.name)


def unused(path: Path) -> Path:
    """Returns the path if it does not exist, else the first of `path-2`, `path-3`, … that does not exist."""
    names = (path.with_name(f"{path.name}-{number}") if number > 1 else path for number in count(1))
    return next(candidate for candidate in names if not candidate.exists())


def remove_directory(path: Path, renamed: Callable[[], object] = lambda: None) -> None:
    """Removes a directory; it is never visible half removed under its name.

    Args:
        path: the directory.
        renamed: closes files in it, which NFS could not remove, once the directory has another name.
    """
    doomed = path.with_name(_REMOVING + path.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    renamed()
    shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Removes incomplete directories and files that killed processes left in `parent`."""
    for leftover in [*parent.glob(f"{_WRITING}*"), *parent.glob(f"{_REMOVING}*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with suppress(OSError):
                leftover.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
