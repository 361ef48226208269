"""Directories and files that appear whole or not at all, whenever the process dies."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

_WRITING, _REMOVING = ".writing-", ".removing-"


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `final` at the end; what stood there goes only then.

    Everything is flushed to the disk before the rename, so that a power cut leaves the old or the new one. After an
    error nothing is left of what was written: on a full disk, room is what is needed.
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
        # safetensors makes its files readable by their owner alone.
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
    """Finishes what a process was killed in: between two renames, a directory to be replaced has no name.

    May be called by several processes at once.
    """
    for old in parent.glob(f"{_REMOVING}*"):
        final = parent / old.name.removeprefix(_REMOVING)
        aside = parent / (_WRITING + final.name)
        if not final.exists():
            # The new directory was whole before the old one lost its name; without one, the old one was to go.
            with suppress(OSError):
                aside.rename(final)


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file; what stood there goes only when the new one is whole."""
    aside = path.with_name(_WRITING + path.name)
    try:
        aside.write_bytes(content)
        _flush(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def unused(path: Path) -> Path:
    """The path itself where nothing is there, else the first of `path-2`, `path-3` … that is not taken."""
    names = (path.with_name(f"{path.name}-{number}") if number > 1 else path for number in count(1))
    return next(candidate for candidate in names if not candidate.exists())


def remove_directory(path: Path) -> None:
    """Removes a directory so that it is never seen half empty under its name."""
    doomed = path.with_name(_REMOVING + path.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(parent: Path) -> None:
    """Removes what killed processes left half written or half removed in `parent`."""
    for leftover in [*parent.glob(f"{_WRITING}*"), *parent.glob(f"{_REMOVING}*")]:
        shutil.rmtree(leftover, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
