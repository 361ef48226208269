"""Worker processes of a `DataLoader`: how they start, what happens when one dies, and when they end."""

import faulthandler
import gc
import math
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lora_dist.errors import ProcessError, UserError
from lora_dist.processes.launcher import end_with_parent
from lora_dist.processes.lifetime import STACKS_SIGNAL
from lora_dist.processes.signals import STOP_SIGNALS
from lora_dist.storage.disk import free_bytes, readable

SHARED_MEMORY = Path("/dev/shm")
"""Where a worker puts the batches that it hands over (Linux)."""
POLL_SECONDS = 2.0
"""The `timeout` of a loader that is watched for silence."""
SILENT_SECONDS = 600.0
"""How long the workers of a loader may deliver nothing, where nothing else watches for a stall."""


_MORE_SHARED_MEMORY = (
    "Give the container more (docker run --shm-size or --ipc=host), or lower --dataloader_num_workers or "
    "--dataloader_prefetch_factor."
)


class WorkerDiedError(ProcessError):
    """A worker process was killed, crashed, or hangs."""

    exit_code = 1


def worker_loader(dataset: Dataset, *, workers: int, pin_memory: bool = False, **options: Any) -> DataLoader:
    """A `DataLoader` whose workers end with this process, and leave signals to it.

    Args:
        dataset: whose items, or batches, are handed over as they are.
        workers: number of processes; 0 for none.
        pin_memory: whether to copy tensors to page-locked memory.
        options: of `DataLoader`, about the batches; those about workers count only where there are some.
    """
    if not workers:
        options = {name: value for name, value in options.items() if name not in ("prefetch_factor", "timeout")}
        options["persistent_workers"] = False
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=set_up_worker,
        pin_memory=pin_memory,
        # Not to draw from torch's global generator.
        generator=torch.Generator(),
        **options,
    )


def from_workers(loader: DataLoader, silent_seconds: float | None = None) -> Iterator[Any]:
    """What the workers of a loader deliver, in order.

    Args:
        loader: as `worker_loader` makes it.
        silent_seconds: for which the workers may deliver nothing; None where something else watches for a stall.

    Raises:
        WorkerDiedError: one of them died, or they deliver nothing for too long.
    """
    iterator, finished = None, False
    try:
        iterator = _started(loader)
        while not finished:
            deadline = math.inf if silent_seconds is None else time.monotonic() + silent_seconds
            try:
                found = _next_before(deadline, iterator)
            except StopIteration:
                finished = True
            else:
                yield found
    except (RuntimeError, OSError, EOFError) as error:
        explained = _explained(error, loader._iterator if iterator is None else iterator)
        if explained is error:
            raise
        raise explained from error
    finally:
        if not finished:
            _kill_workers(loader._iterator if iterator is None else iterator)
            # The next pass starts new ones, where they would have stayed.
            loader._iterator = None


def _started(loader: DataLoader) -> Iterator[Any]:
    """An iterator over a loader, whose workers are started, or waked up where they have stayed."""
    if not loader.num_workers:
        return iter(loader)
    # Workers share this process's directory for sockets, which goes with it. One that is killed leaves its own.
    multiprocessing.util.get_temp_dir()
    before = signal.getsignal(signal.SIGCHLD)
    # A signal that comes while workers start is for this process alone; they inherit that it is blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if multiprocessing.get_start_method() == "forkserver":
            # Its children need not import everything again.
            multiprocessing.set_forkserver_preload(["__main__", type(loader.dataset).__module__])
            multiprocessing.forkserver.ensure_running()
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None and threading.current_thread() is threading.main_thread():
            # Torch's handler would raise for a dead worker wherever this process happens to be, say in a collective.
            # Without it, `next` raises within 5 s of waiting for a batch of the dead worker.
            signal.signal(signal.SIGCHLD, before)


def _next_before(deadline: float, iterator: Iterator[Any]) -> Any:
    """The next item. A loader with a `timeout` raises each time that this passes, and may be asked again."""
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise WorkerDiedError(
                    "the loader's workers deliver nothing any more. Does the disk with the images answer? kill -QUIT "
                    "on a worker shows where it is."
                ) from error


def _kill_workers(iterator: Any) -> None:
    """Ends the workers of an iterator that is left: torch would wait 5 s for each that does not end by itself."""
    workers = getattr(iterator, "_workers", ())
    for worker in workers:
        worker.kill()
    end = time.monotonic() + 1
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    # Not even SIGKILL ends one that waits for a disk. The kernel ends it, once the disk answers.
    if workers and not any(worker.is_alive() for worker in workers):
        iterator._shutdown_workers()


def set_up_worker(worker: int) -> None:
    """For `worker_init_fn`: the first thing that a worker process does."""
    end_with_parent()
    if multiprocessing.get_start_method() == "forkserver" or sys.platform != "linux":
        threading.Thread(target=_end_with_trainer, daemon=True).start()
    # Schedulers and terminals signal a whole group. The trainer needs its workers to finish the update.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    # Keeps the worker from finalizing objects that it inherited through fork: a store's destructor joins a thread that
    # only the parent has.
    gc.freeze()


def _end_with_trainer() -> None:
    """Ends this worker when the process that reads from it dies.

    The parent of a worker may be the fork server, which in turn lives as long as any of its workers.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        multiprocessing.connection.wait([trainer.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def require_shared_memory(needed: int) -> None:
    """Raises a `UserError` where /dev/shm is too small for the batches that wait in it.

    Args:
        needed: bytes of all batches that the workers of all processes on this machine prepare ahead.
    """
    if not SHARED_MEMORY.is_dir():
        return
    free = free_bytes(SHARED_MEMORY)
    if needed > free:
        raise UserError(
            f"{SHARED_MEMORY} has {readable(free)} free, and the loader's workers need {readable(needed)} there for "
            f"the batches that they prepare ahead. {_MORE_SHARED_MEMORY}"
        )


def _explained(error: Exception, iterator: Any) -> Exception:
    """The sentence for what a dead or silent worker leads to; other errors as they are."""
    text = str(error)
    killed_by = _signals_of(iterator)
    if signal.SIGBUS in killed_by or "shared memory" in text:
        return WorkerDiedError(f"a worker of the loader found no room in {SHARED_MEMORY}. {_MORE_SHARED_MEMORY}")
    if signal.SIGKILL in killed_by:
        return WorkerDiedError(
            "a worker of the loader was ended by SIGKILL. The system kills the process that takes most when memory "
            "runs out: give the job more, or a lower --dataloader_num_workers."
        )
    if killed_by or "DataLoader worker" in text:
        by = f" by {', '.join(number.name for number in killed_by)}" if killed_by else ""
        return WorkerDiedError(f"a worker of the loader was ended{by}. --dataloader_num_workers 0 works without them.")
    return error


def _signals_of(iterator: Any) -> set[signal.Signals]:
    """The signals that workers died of. The news of a death may come a moment after the broken connection."""
    workers = getattr(iterator, "_workers", ())
    end = time.monotonic() + 1
    while workers and all(worker.is_alive() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    codes = (worker.exitcode for worker in workers)
    return {signal.Signals(-code) for code in codes if code is not None and code < 0}


def _as_is(found: Any) -> Any:
    return found
