"""Worker processes of a `DataLoader`: their start, the death of one, and their end."""

import faulthandler
import gc
import math
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.util
import shutil
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
from lora_dist.logs import ignore_warnings_of_pillow
from lora_dist.processes.lifetime import STACKS_SIGNAL
from lora_dist.processes.parent_death import end_with_parent, end_with_starter
from lora_dist.processes.signals import STOP_SIGNALS
from lora_dist.storage.disk import free_bytes, readable

SHARED_MEMORY = Path("/dev/shm")
"""Shared memory through which workers pass batches to the training process (Linux)."""
POLL_SECONDS = 2.0
"""`timeout` of a `DataLoader` whose workers are checked for stalls."""
SILENT_SECONDS = 600.0
"""Seconds for which the workers may deliver no batch, where no `Watch` detects stalls."""


_MORE_SHARED_MEMORY = (
    "Give the container more (docker run --shm-size or --ipc=host), or lower --dataloader_num_workers or "
    "--dataloader_prefetch_factor."
)


class WorkerDiedError(ProcessError):
    """A worker process was killed, crashed, or hangs."""

    exit_code = 1


def worker_loader(dataset: Dataset, *, workers: int, pin_memory: bool = False, **options: Any) -> DataLoader:
    """Creates a `DataLoader` whose workers end with this process and ignore stop signals.

    Args:
        dataset: its items, or batches, are passed on without collation.
        workers: number of processes; 0 for none.
        pin_memory: whether to copy tensors to page-locked memory.
        options: further options of `DataLoader`; options for workers are ignored if `workers` is 0.
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
        # Otherwise the loader would draw from torch's global generator.
        generator=torch.Generator(),
        **options,
    )


def from_workers(loader: DataLoader, silent_seconds: float | None = None) -> Iterator[Any]:
    """Yields the batches of a loader, in order.

    Args:
        loader: as `worker_loader` makes it.
        silent_seconds: how long the workers may deliver nothing; None for no limit, if a `Watch` detects stalls.

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
            # Makes the next pass over a loader with persistent workers start new ones.
            loader._iterator = None


def _started(loader: DataLoader) -> Iterator[Any]:
    """Returns an iterator over a loader; starts its workers, or reuses persistent ones."""
    if not loader.num_workers:
        return iter(loader)
    # Workers share this process's directory for sockets, which is removed with it; a killed worker would leave its own.
    multiprocessing.util.get_temp_dir()
    before = signal.getsignal(signal.SIGCHLD)
    # A signal that arrives while workers start is for this process alone; they start with it blocked.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if multiprocessing.get_start_method() == "forkserver":
            # The workers that the fork server starts need not import these modules again.
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
    """Returns the next item. A loader with a `timeout` raises an error whenever it passes, and can be asked again."""
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise WorkerDiedError(
                    "the DataLoader workers no longer deliver batches. Check that the disk with the images responds. "
                    "To see where a worker hangs, run kill -QUIT PID."
                ) from error


def _kill_workers(iterator: Any) -> None:
    """Kills the workers of an abandoned iterator; torch would wait 5 s for each one that does not exit."""
    workers = getattr(iterator, "_workers", ())
    for worker in workers:
        worker.kill()
    end = time.monotonic() + 1
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
    # Even SIGKILL ends a worker that waits for a disk only when the disk answers.
    if workers and not any(worker.is_alive() for worker in workers):
        iterator._shutdown_workers()


def set_up_worker(worker: int) -> None:
    """For `worker_init_fn`: the first thing that a worker process does."""
    end_with_parent()
    if multiprocessing.get_start_method() == "forkserver" or sys.platform != "linux":
        threading.Thread(target=end_with_starter, daemon=True).start()
    # Schedulers and terminals signal a whole group. The trainer needs its workers to finish the update.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    ignore_warnings_of_pillow()
    # Keeps the worker from finalizing objects that it inherited through fork: a store's destructor joins a thread that
    # only the parent has.
    gc.freeze()


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
            f"{SHARED_MEMORY} has {readable(free)} free, but the DataLoader workers need {readable(needed)} for "
            f"the batches that they prefetch. {_MORE_SHARED_MEMORY}"
        )


def _explained(error: Exception, iterator: Any) -> Exception:
    """Returns a `WorkerDiedError` if a dead worker caused the error, otherwise the error itself."""
    text = str(error)
    killed_by = _signals_of(iterator)
    if signal.SIGBUS in killed_by and not _shared_memory_is_nearly_full():
        return WorkerDiedError(
            f"a DataLoader worker was killed by SIGBUS: {SHARED_MEMORY} was full, or the file system of memory-mapped "
            f"data (--cache_dir, Arrow files) failed. Check that file system. {_MORE_SHARED_MEMORY}"
        )
    if signal.SIGBUS in killed_by or "shared memory" in text:
        return WorkerDiedError(f"a DataLoader worker ran out of space in {SHARED_MEMORY}. {_MORE_SHARED_MEMORY}")
    if signal.SIGKILL in killed_by:
        return WorkerDiedError(
            "a DataLoader worker was killed by SIGKILL, usually because the machine ran out of memory. Request more "
            "memory for the job, or lower --dataloader_num_workers."
        )
    if killed_by or "DataLoader worker" in text:
        by = f" by {', '.join(number.name for number in killed_by)}" if killed_by else ""
        return WorkerDiedError(f"a DataLoader worker was terminated{by}. --dataloader_num_workers 0 uses no workers.")
    return error


def _shared_memory_is_nearly_full() -> bool:
    """Whether less than a fifth of it is free. The batch that did not fit no longer takes up space."""
    return SHARED_MEMORY.is_dir() and free_bytes(SHARED_MEMORY) < shutil.disk_usage(SHARED_MEMORY).total / 5


def _signals_of(iterator: Any) -> set[signal.Signals]:
    """Returns the signals that killed workers; waits up to 1 s, because exit codes may arrive late."""
    workers = getattr(iterator, "_workers", ())
    end = time.monotonic() + 1
    while workers and all(worker.is_alive() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    codes = (worker.exitcode for worker in workers)
    return {signal.Signals(-code) for code in codes if code is not None and code < 0}


def _as_is(found: Any) -> Any:
    return found
