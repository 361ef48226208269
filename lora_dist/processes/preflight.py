"""Barriers of the start-up that name the missing processes, and a timed all-reduce."""

import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch.distributed import DistError, all_reduce, is_initialized

from lora_dist import waiting
from lora_dist.errors import ProcessError, TrainingStoppedError, UserError, first_line
from lora_dist.processes.failure import format_ranks, read_failure
from lora_dist.processes.lifetime import end_process, end_with_error
from lora_dist.processes.rendezvous import launch_store, store_lost

logger = logging.getLogger(__name__)

SIZE = 2**20
"""Number of elements in the timed all-reduce: 4 MiB in fp32, about the size of the LoRA gradient of a ViT-L."""
STORE_SECONDS = 10.0
"""Seconds to wait, beyond the timeout, for a request to the store."""


class Preflight:
    """Barriers that name the processes that have not arrived. They do nothing in a launch of a single process."""

    def __init__(self, timeout: timedelta) -> None:
        """
        Args:
            timeout: how long to wait for the slowest process.

        Raises:
            UserError: the other processes cannot be reached; see `launch_store`.
        """
        self._timeout = timeout
        self._store = launch_store(timeout)
        self._rank, self._world_size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))

    def arrive(self, where: str) -> None:
        """Waits until every process has called this method with the same `where`.

        Args:
            where: name of this barrier, for messages; must be unique within the run.

        Raises:
            UserError: some processes did not arrive in time (the message names them), or a process has failed (the
                error has the exit code of that process).
            TrainingStoppedError: the process that hosts the store has ended.
        """
        if self._store is not None:
            self._set(where)
            self._wait_for(where, range(self._world_size))

    @contextmanager
    def first_process_first(self, where: str) -> Iterator[None]:
        """Makes all other processes wait until rank 0 has left the context.

        Like `accelerator.main_process_first`, but if rank 0 fails, the others raise an error instead of waiting.

        Raises:
            UserError: see `arrive`.
        """
        if self._store is None:
            yield
            return
        if self._rank:
            self._wait_for(where, [0])
        yield
        self._set(where)

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Context for the initialization of the process group, after all processes have arrived.

        Raises:
            UserError: this process could not connect to the others, or another process has failed.
        """
        message = f"waiting for {self._world_size} processes to connect to each other; giving up after {self._limit}"
        with waiting.log_wait(message, logs=self._store is not None and self._rank == 0):
            try:
                yield
            except RuntimeError as error:
                if self._store is None or is_initialized():
                    raise
                with _store_errors():
                    failure = read_failure(self._store)
                raise failure or ProcessError(
                    f"all {self._world_size} processes have arrived, but this one could not connect to the others: "
                    f"{first_line(error)}. Check that no firewall blocks traffic between the nodes and that "
                    f"NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the right network interface."
                ) from error

    def time_all_reduce(self, accelerator: Accelerator) -> None:
        """Logs the duration of an all-reduce. Ends the process if it does not finish within the timeout."""
        if self._store is None:
            return
        unfinished = (
            f"all {self._world_size} processes have arrived, but an all-reduce did not finish within {self._limit}. "
            f"Check that no firewall blocks traffic between the nodes and that NCCL_SOCKET_IFNAME and "
            f"GLOO_SOCKET_IFNAME name the right network interface. NCCL_DEBUG=INFO logs details."
        )
        numbers = torch.zeros(SIZE, device=accelerator.device)
        seconds = []
        message = f"waiting for an all-reduce between {self._world_size} processes; giving up after {self._limit}"
        with (
            waiting.log_wait(message, logs=self._rank == 0),
            _time_limit(self._timeout.total_seconds(), unfinished if self._rank == 0 else ""),
        ):
            for _ in range(4):
                start = time.perf_counter()
                all_reduce(numbers)
                float(numbers[0])
                seconds.append(time.perf_counter() - start)
        # The first all-reduce opens the connections.
        logger.info(
            "%d processes; an all-reduce of %d MiB takes %.1f ms",
            self._world_size,
            SIZE * 4 // 2**20,
            1e3 * statistics.median(seconds[1:]),
        )

    def _set(self, where: str) -> None:
        assert self._store is not None
        with _store_errors():
            self._store.set(f"{where}/{self._rank}", socket.gethostname())

    def _wait_for(self, where: str, numbers: Iterable[int]) -> None:
        assert self._store is not None
        deadline = time.monotonic() + self._timeout.total_seconds()
        missing = list(numbers)

        def message() -> str | None:
            if not missing or not self._logs_for_all(missing):
                return None
            return (
                f"waiting for {format_ranks(missing, self._world_size)} (stage: {where}); giving up after {self._limit}"
            )

        silent = (
            f"rank {self._rank}: the store of the launch has not answered within {self._limit} (stage: {where}). "
            f"Check that the process that hosts it, rank 0 or the launcher, is not suspended."
        )
        # The deadline below is checked between requests to the store, which may never be answered.
        limit = _time_limit(self._timeout.total_seconds() + STORE_SECONDS, silent)
        with waiting.log_wait(message, logs=True), _store_errors(), limit:
            while missing := [rank for rank in missing if not self._store.check([f"{where}/{rank}"])]:
                if failure := read_failure(self._store):
                    raise failure
                if time.monotonic() > deadline:
                    raise self._not_here(where, missing)
                time.sleep(0.01)

    def _not_here(self, where: str, missing: list[int]) -> UserError:
        assert self._store is not None
        there = [rank for rank in range(self._world_size) if self._store.check([f"{where}/{rank}"])]
        arrived = ", ".join(f"{rank} on {self._store.get(f'{where}/{rank}').decode()}" for rank in there)
        message = (
            f"{format_ranks(missing, self._world_size)} did not arrive within {self._limit}. "
            f"Arrived: {arrived or 'none'}. Check the last log lines of the missing processes. If they only start "
            f"slowly, raise --ddp_timeout."
        )
        return ProcessError(message) if self._logs_for_all(missing) else UserError(message)

    def _logs_for_all(self, missing: list[int]) -> bool:
        """Whether this process logs for all of them: it has the lowest rank that has arrived."""
        return self._rank == next(rank for rank in range(self._world_size) if rank not in missing)

    @property
    def _limit(self) -> str:
        return f"{self._timeout.total_seconds():.0f} s"


@contextmanager
def _store_errors() -> Iterator[None]:
    """Converts a connection error of the store into a `TrainingStoppedError`."""
    try:
        yield
    except DistError as error:
        raise store_lost() from error


@contextmanager
def _time_limit(seconds: float, message: str) -> Iterator[None]:
    """Ends this process if the block takes longer. For calls that nothing can interrupt.

    Args:
        seconds: the limit.
        message: of the error; empty for none.
    """

    def give_up() -> None:
        if message:
            end_with_error(message, TrainingStoppedError.exit_code)
        end_process(TrainingStoppedError.exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
