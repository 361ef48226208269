"""A list of files to leave out of the data: the audit writes it, a person may edit it, training reads it.

One path a line; a relative one starts from the current directory. Lines that begin with `#`, and empty ones, are
skipped. A path that would not be read back as it is, such as one with a line break, stands in double quotes as a JSON
string.
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
    """Files that are on the list for the same reason.

    Attributes:
        heading: the reason, on one line.
        paths: of the files.
        active: False for files that are only proposed: they stand behind a `#`.
    """

    heading: str
    paths: Sequence[str]
    active: bool = True


def absolute(path: str) -> str:
    """The path by which a file is known on a list. Links stay: what they lead to is another file of the data."""
    return os.path.abspath(path)  # noqa: PTH100


def write_exclusions(file: Path, sections: Iterable[Section]) -> None:
    """Writes a list that `read_exclusions` reads, with absolute paths."""
    lines = ["# Files to leave out: lora_dist.train --exclude THIS_FILE"]
    for section in sections:
        mark = "" if section.active else "#"
        lines += ["", f"# {section.heading}", *(mark + _line(absolute(path)) for path in section.paths)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _line(path: str) -> str:
    # What is not printable includes line breaks, and the bytes of a name that is not UTF-8.
    return path if path.isprintable() and path == path.strip() else json.dumps(path)


def read_exclusions(file: str | Path) -> frozenset[str]:
    """The files on a list, as absolute paths; says so where there are none, as after an audit that found nothing.

    Raises:
        UserError: the file cannot be read, or a line of it is no path.
    """
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
        logger.warning("--exclude %s: the list names no file, and leaves none out", file)
    return paths


def _path(line: str, where: str) -> str:
    path = line
    if line.startswith('"'):
        try:
            path = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: {line[:80]} is no JSON string; a path without quotes is fine") from error
    if "\0" in path:
        raise UserError(f"{where}: this is no path; the list is a text file with one path a line")
    return path
