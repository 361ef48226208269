"""A list of files to exclude from the data: the audit writes it, a person may edit it, training reads it.

One path per line, relative to the current directory or absolute. Empty lines and lines that begin with `#` are skipped.
A path with unprintable characters, or with spaces at an end, is written as a JSON string in double quotes.
"""

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_dist.errors import UserError

logger = logging.getLogger(__name__)


class Section(NamedTuple):
    """Files that are listed for the same reason, the `heading`; commented out unless `active`."""

    heading: str
    paths: Sequence[str]
    active: bool = True


def absolute(path: str) -> str:
    """The absolute path of a file, links not resolved: the target of a link is another file of the data."""
    return os.path.abspath(path)  # noqa: PTH100


def write_exclusions(file: Path, sections: Iterable[Section]) -> None:
    """Writes a list of absolute paths for `read_exclusions`."""
    lines = ["# Files to leave out: lora_dist.train --exclude THIS_FILE"]
    for section in sections:
        mark = "" if section.active else "#"
        lines += ["", f"# {section.heading}", *(mark + _line(absolute(path)) for path in section.paths)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _line(path: str) -> str:
    # Line breaks and bytes that are not UTF-8 are not printable.
    return path if path.isprintable() and path == path.strip() else json.dumps(path)


def read_exclusions(file: str | Path) -> frozenset[str]:
    """The absolute paths on a list; warns of an empty list, and raises `UserError` if it cannot be read."""
    try:
        text = Path(file).read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--exclude {file}: {error.strerror}") from error
    paths = frozenset(
        absolute(_path(line, f"--exclude {file}, line {number}"))
        for number, line in enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)
        if line.strip() and not line.startswith("#")
    )
    if not paths:
        logger.warning("--exclude %s: the list names no file, so it excludes none", file)
    return paths


def _path(line: str, where: str) -> str:
    path = line
    if line.startswith('"'):
        try:
            path = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: {line[:80]} is not a JSON string; write the path without quotes") from error
    if "\0" in path:
        raise UserError(f"{where}: not a path; the list is a text file with one path per line")
    return path
