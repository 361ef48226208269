"""Curves on disk, as TensorBoard's events and as JSON lines. A failed write is logged, and never stops the run."""

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lora_dist.storage.atomic import replace_file

logger = logging.getLogger(__name__)


class EventFile:
    """TensorBoard's writer. On a full disk it fails at any later call, and the run continues without it."""

    def __init__(self, directory: Path, first_step: int, evaluated: bool = True) -> None:
        """
        Args:
            directory: for the event files.
            first_step: entries of later steps are hidden.
            evaluated: whether the evaluation after `first_step` counts; if not, all of that step is hidden.
        """
        _suppress_writer_tracebacks()
        self._directory = directory
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(str(directory), purge_step=first_step + evaluated)
        except OSError as error:
            logger.error("no TensorBoard: %s. Training continues; metrics.jsonl has the numbers.", error)

    def write(self, write: Callable[..., object], *arguments: object, **options: object) -> None:
        """Calls a method of the writer, unless a call has failed before."""
        if self._writer is None:
            return
        try:
            if not self._directory.is_dir():
                logger.error("%s was removed; the curves start again", self._directory)
                self._writer = SummaryWriter(str(self._directory))
            write(self._writer, *arguments, **options)
        except Exception as error:
            # An error in the thread of the writer is raised here.
            logger.error("TensorBoard ends here: %s. Training continues; metrics.jsonl has the numbers.", error)
            self._writer = None


def _suppress_writer_tracebacks() -> None:
    """Suppresses the traceback of TensorBoard's writer thread; the next call of the writer raises its error."""
    before = threading.excepthook

    def hook(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            before(arguments)

    threading.excepthook = hook


class JsonLines:
    """A file of JSON lines. A line that cannot be written is kept for the next call.

    Attributes:
        last: the content of the lines of `first_step`.
    """

    def __init__(self, path: Path, first_step: int, evaluated: bool = True) -> None:
        """
        Args:
            first_step: update from which the run starts or resumes; lines of later updates are removed.
            evaluated: whether the evaluation after `first_step` counts; if not, its line is removed too.
        """
        self._path = path
        self._waiting: list[str] = []
        self.last = [line for line in _drop_lines_after(path, first_step, evaluated) if line["step"] == first_step]

    def write(self, line: str) -> None:
        """Writes the lines that wait, and this one."""
        self._waiting.append(line)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                content = "".join(self._waiting).encode()
                if file.write(content) < len(content):
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if len(self._waiting) == 1:
                logger.error("cannot write to %s: %s. Its lines are kept for the next attempt.", self._path, error)
        else:
            self._waiting.clear()


def _drop_lines_after(path: Path, step: int, evaluated: bool) -> list[dict[str, Any]]:
    """Removes the lines of updates that a resumed run repeats, and a half-written last one; returns the others."""
    kept: list[bytes] = []
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    try:
        for line in path.read_bytes().splitlines():
            try:
                content = json.loads(line)
                again = content["step"] == step and not evaluated and "eval/loss" in content
                if content["step"] <= step and not again:
                    kept.append(line)
                    found.append(content)
            except (ValueError, KeyError, TypeError):
                continue
        replace_file(path, b"".join(line + b"\n" for line in kept))
    except OSError as error:
        logger.error("cannot write to %s: %s. Its lines of updates after %d stay.", path, error, step)
    return found
