"""Reports the failure of a process to the other processes, so that they exit instead of waiting for it."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from lora_dist import waiting
from lora_dist.errors import PreemptedError, TrainingStoppedError, UserError
from lora_dist.processes.rendezvous import JoinError, Launch, is_registered, launch_store

if TYPE_CHECKING:
    from torch.distributed import Store

_FAILED = "failed"
CONNECT_SECONDS = 2.0
"""Limit for a failing process to reach the store after `init_process_group`: a live store answers at once."""
READ_SECONDS = 3.0
"""Seconds for which a failed rank 0 keeps the store alive. The other processes check it every second."""
STARTUP_SECONDS = 30.0
"""Limit for the others to start and to read a failure from before `init_process_group`."""


class RankFailedError(UserError):
    """Raised if another process has failed. This process then exits with the same code."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        """
        Args:
            message: the process that failed and the reason.
        """
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def report_failure() -> Iterator[None]:
    """Writes an exception to the rendezvous store before re-raising it, so that the other processes can read it.

    `TrainingStoppedError`, `PreemptedError` and `JoinError` are not written: each process detects those by itself.
    """
    # Keeps torch from printing C++ stack frames when the store is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    start = time.monotonic()
    try:
        yield
    except (TrainingStoppedError, PreemptedError, JoinError):
        raise
    except BaseException as error:
        # If the store is gone, no other process can read the failure.
        with suppress(RuntimeError, OSError, JoinError, TrainingStoppedError):
            _report(error, start)
        raise


def _report(error: BaseException, start: float) -> None:
    if isinstance(error, SystemExit) and not error.code and "torch" not in sys.modules:
        return  # --help
    all_started = start + STARTUP_SECONDS
    connect_seconds, read_seconds = max(5.0, all_started - time.monotonic()), STARTUP_SECONDS
    joined = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    if joined or isinstance(error, KeyboardInterrupt):
        connect_seconds, read_seconds = CONNECT_SECONDS, READ_SECONDS
    store, launch = launch_store(timedelta(seconds=connect_seconds)), Launch.read()
    if store is None or launch is None:
        return
    exit_code, reason = _describe(error)
    write_failure(store, f"rank {launch.rank} on {socket.gethostname()} failed: {reason}", exit_code)
    failure = read_failure(store)
    if launch.hosts():
        _wait_until_read(store, launch.world_size, read_seconds, all_started, str(failure))


def _describe(error: BaseException) -> tuple[int, str]:
    """Returns the exit code for the other processes, which is never 0, and a description of an exception."""
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) and error.code else 1, f"exited with {error.code or 0}"
    return 1, f"{type(error).__name__}: {error}"


def write_failure(store: "Store", message: str, exit_code: int) -> None:
    """Writes a failure to the store, unless it already holds one."""
    store.compare_set(_FAILED, "", json.dumps([exit_code, message]))


def _wait_until_read(store: "Store", world_size: int, seconds: float, all_started: float, failure: str) -> None:
    """Keeps this process, which hosts the store, alive until the others have read the failure, for a limited time."""
    end = time.monotonic() + seconds
    missing = list(range(world_size))
    with waiting.log_wait(lambda: f"waiting for {format_ranks(missing, world_size)} to read this failure: {failure}"):
        while missing and time.monotonic() < end:
            time.sleep(0.05)
            missing = [rank for rank in missing if not store.check([_read_key(rank)]) and not has_left(store, rank)]
            if time.monotonic() > all_started:
                missing = [rank for rank in missing if is_registered(store, rank)]


def _read_key(rank: int | str) -> str:
    return f"read/{rank}"


def mark_left(store: "Store", rank: int) -> None:
    """Records that a process has exited normally or that its death has been reported: nobody waits for it any more."""
    store.set(f"left/{rank}", "")


def has_left(store: "Store", rank: int) -> bool:
    """Whether `mark_left` was called for a rank."""
    return store.check([f"left/{rank}"])


def read_failure(store: "Store", rank: int | None = None) -> RankFailedError | None:
    """Returns the first failure in the store as an exception to raise, or None.

    Also marks the failure as read by this rank, for the process that hosts the store.

    Args:
        store: as `launch_store` returns it.
        rank: of this process; default: RANK. Pass it in threads, because accelerate clears RANK temporarily.

    Raises:
        DistNetworkError: the store is gone; see `rendezvous.store_lost`.
    """
    if not store.check([_FAILED]):
        return None
    exit_code, message = json.loads(store.get(_FAILED))
    store.set(_read_key(os.environ["RANK"] if rank is None else rank), "")
    return RankFailedError(message, exit_code)


def format_ranks(numbers: list[int], world_size: int) -> str:
    """Formats ranks, such as `ranks 1, 3 of 4`; shows at most eight."""
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:8]))}{more} of {world_size}"
