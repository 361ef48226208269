"""Says what a process is waiting for, once that has taken a while."""

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
"""A wait that is shorter is not mentioned."""
AGAIN_SECONDS = 60.0
"""How often a longer one is mentioned again."""

LOCK_SECONDS = 6 * 3600.0
"""How long a process waits for another one that builds what both need."""

logger = logging.getLogger(__name__)
# Heard on every process, and before the logs are set up: the one that waits may be any of them.
logger.setLevel(logging.WARNING)


def speaks_for_its_node() -> bool:
    """Whether this is the process that speaks for those of its node, in what they all wait for."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def told(what: str | Callable[[], str | None], speaks: bool | None = None) -> Iterator[None]:
    """Logs what this block is waiting for, after `AFTER_SECONDS` and then every `AGAIN_SECONDS`.

    Args:
        what: such as "waiting for rank 1", or what returns that at any moment; None says nothing.
        speaks: whether this process says it; by default one process of each node does.
    """
    if not (speaks_for_its_node() if speaks is None else speaks):
        yield
        return
    ended, start = threading.Event(), time.monotonic()

    def tell() -> None:
        seconds = AFTER_SECONDS
        while not ended.wait(seconds):
            message = what if isinstance(what, str) else what()
            if message is not None:
                logger.warning("%s (%.0f s so far)", message, time.monotonic() - start)
            seconds = AGAIN_SECONDS

    thread = threading.Thread(target=tell, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def locked(path: str | Path, task: str) -> Iterator[None]:
    """Holds a lock between processes, of this run and others; one that dies gives it back.

    Args:
        path: of the lock.
        task: what the process that has it does, such as "builds the cache".

    Raises:
        UserError: another process has held it for `LOCK_SECONDS`.
    """
    lock = FileLock(path)
    what = f"waiting for another process, which {task} and holds the lock {path}"
    with told(f"{what}; giving up after {LOCK_SECONDS / 3600:.0f} h"):
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise UserError(f"gave up {what}: does it hang? `fuser {path}` names it") from error
    try:
        yield
    finally:
        lock.release()
