"""A process that fails tells the others of its launch, so that they need not wait for it."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from lora_dist.errors import PreemptedError, TrainingStoppedError, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_FAILED = "failed"


def launch_store(timeout: timedelta) -> "Store | None":
    """What the processes of this launch have in common before they have joined: the store of torchrun.

    Returns:
        None where there is a single process, or another launcher.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or int(os.environ["WORLD_SIZE"]) == 1:
        return None
    from torch.distributed import rendezvous

    return next(rendezvous("env://", timeout=timeout))[0]


@contextmanager
def others_told() -> Iterator[None]:
    """Puts an error into the store of the launch before it is raised further.

    What ends a run in the middle is left out: all processes know of that by themselves.
    """
    try:
        yield
    except (TrainingStoppedError, PreemptedError):
        raise
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        # The store is gone where the first node is; then there is nobody to tell.
        with suppress(RuntimeError, OSError):
            store = launch_store(timedelta(seconds=5))
            if store is not None:
                message = f"rank {os.environ['RANK']} on {socket.gethostname()} failed: {kind}{error}"
                store.compare_set(_FAILED, "", message)
        raise


def tell_failure(store: "Store", message: str, exit_code: int) -> None:
    """Puts a failure into the store, unless there is one already."""
    store.compare_set(_FAILED, "", message)


def told_failure(store: "Store") -> str | None:
    """Which process has failed first, and of what; None if none has."""
    return store.get(_FAILED).decode() if store.check([_FAILED]) else None
