"""A process that fails tells the others of its launch, so that they need not wait for it."""

import json
import os
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
JOINED_SECONDS = 2.0
"""How long a process that fails waits for the store once all have joined: it is there at once, or gone."""
TELLING_SECONDS = 30.0
"""How long the processes of a launch may take to start, one after the other, for a failure to reach them all."""


class RankFailedError(UserError):
    """Another process has failed, and so does this one, with the same exit code."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        """
        Args:
            message: which process failed, and of what.
            exit_code: of that process.
        """
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def report_failure() -> Iterator[None]:
    """Puts an error into the store of the launch before it is raised further.

    What ends a run in the middle is left out: all processes know of that by themselves.
    """
    # Or torch prints frames of C++ when a store that it asks is gone, beside what is said of it here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    start = time.monotonic()
    try:
        yield
    except (TrainingStoppedError, PreemptedError, JoinError):
        raise
    except Exception as error:
        # The store is gone where the first node is; then there is nobody to tell.
        with suppress(RuntimeError, OSError, JoinError, TrainingStoppedError):
            _tell(error, start)
        raise


def _tell(error: Exception, start: float) -> None:
    # Once the processes have joined, the store is there at once or gone.
    joined = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    seconds = JOINED_SECONDS if joined else max(5.0, start + TELLING_SECONDS - time.monotonic())
    store, launch = launch_store(timedelta(seconds=seconds)), Launch.read()
    if store is None or launch is None:
        return
    exit_code, kind = (error.exit_code, "") if isinstance(error, UserError) else (1, f"{type(error).__name__}: ")
    message = f"rank {launch.rank} on {socket.gethostname()} failed: {kind}{error}"
    tell_failure(store, message, exit_code)
    failure = told_failure(store)
    if launch.hosts():
        _wait_until_heard(store, launch.world_size, start, str(failure))


def tell_failure(store: "Store", message: str, exit_code: int) -> None:
    """Puts a failure into the store, unless there is one already."""
    store.compare_set(_FAILED, "", json.dumps([exit_code, message]))


def _wait_until_heard(store: "Store", world_size: int, start: float, failure: str) -> None:
    """Keeps the store for those that have not read the failure yet, and a while for those that are still starting."""
    end, all_started = time.monotonic() + TELLING_SECONDS, start + TELLING_SECONDS
    missing = list(range(world_size))
    with waiting.told(lambda: f"waiting for {ranks(missing, world_size)} to hear this: {failure}"):
        while missing and time.monotonic() < end:
            time.sleep(0.05)
            missing = [rank for rank in missing if not store.check([_heard(rank)])]
            if time.monotonic() > all_started:
                missing = [rank for rank in missing if is_registered(store, rank)]


def _heard(rank: int | str) -> str:
    return f"heard/{rank}"


def told_failure(store: "Store", rank: int | None = None) -> RankFailedError | None:
    """Which process has failed first, and of what, as an error to be raised; None if none has.

    Notes for the process that hosts the store that this one has heard of it.

    Args:
        store: of the launch.
        rank: of this process; by default as the environment says, which accelerate empties for moments.

    Raises:
        DistNetworkError: the store is gone; see `rendezvous.lost`.
    """
    if not store.check([_FAILED]):
        return None
    exit_code, message = json.loads(store.get(_FAILED))
    store.set(_heard(os.environ["RANK"] if rank is None else rank), "")
    return RankFailedError(message, exit_code)


def ranks(numbers: list[int], world_size: int) -> str:
    """Such as `rank 1, 3 of 4`; of many the first ones."""
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"rank {', '.join(map(str, numbers[:8]))}{more} of {world_size}"
