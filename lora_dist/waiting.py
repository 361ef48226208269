"""Logs what a process is waiting for once the wait exceeds `AFTER_SECONDS`."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_dist.errors import UserError

AFTER_SECONDS = 10.0
"""Shorter waits are not logged."""
AGAIN_SECONDS = 60.0
"""Interval between log lines during a longer wait."""

LOCK_SECONDS = 6 * 3600.0
"""Timeout of `locked`, which waits for another process that builds a shared file."""

logger = logging.getLogger(__name__)
# Logs on every process, and before logging is set up: any process may be the one that waits.
logger.setLevel(logging.WARNING)


def is_local_main() -> bool:
    """Whether this process logs for all processes of its node: it has local rank 0."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def log_wait(what: str | Callable[[], str | None], logs: bool | None = None) -> Iterator[None]:
    """Logs what this block is waiting for, after `AFTER_SECONDS` and then every `AGAIN_SECONDS`.

    Args:
        what: message, such as "waiting for rank 1", or a function that returns it (None: log nothing).
        logs: whether this process logs; by default one process per node does.
    """
    if not (is_local_main() if logs is None else logs):
        yield
        return
    ended, start = threading.Event(), time.monotonic()

    def log() -> None:
        seconds = AFTER_SECONDS
        while not ended.wait(seconds):
            message = what if isinstance(what, str) else what()
            if message is not None:
                logger.warning("%s (%.0f s so far)", message, time.monotonic() - start)
            seconds = AGAIN_SECONDS

    thread = threading.Thread(target=log, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(1)  # standard error may block


@contextmanager
def locked(path: str | Path, task: str) -> Iterator[None]:
    """Holds a file lock shared by all processes and runs; it is released if its holder dies.

    Args:
        task: activity of the holder of the lock, such as "builds the cache".

    Raises:
        UserError: another process has held it for `LOCK_SECONDS`.
    """
    lock = FileLock(path)
    what = f"waiting for another process, which {task} and holds the lock {path}"
    with log_wait(f"{what}; giving up after {LOCK_SECONDS / 3600:.0f} h"):
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise UserError(f"gave up {what}. If that process hangs: `fuser {path}` shows its PID") from error
    try:
        yield
    finally:
        lock.release()
