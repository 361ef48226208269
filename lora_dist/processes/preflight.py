"""Whether all processes of a launch arrive and reach each other, found out before anything costly is loaded."""

import logging
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch.distributed import DistError, all_reduce, is_initialized

from lora_dist import waiting
from lora_dist.errors import ProcessError, TrainingStoppedError, UserError
from lora_dist.processes.failure import ranks, told_failure
from lora_dist.processes.rendezvous import launch_store, lost

logger = logging.getLogger(__name__)

SIZE = 2**20
"""Numbers in the all-reduce that is timed, 4 MiB: about the gradient of LoRA on a ViT-L."""


class Preflight:
    """Lets no process go on before all have arrived, and says which have not. A single process it does not hold up."""

    def __init__(self, timeout: timedelta) -> None:
        """
        Args:
            timeout: to wait for the slowest process.

        Raises:
            UserError: the other processes cannot be reached; see `launch_store`.
        """
        self._timeout = timeout
        self._store = launch_store(timeout)
        self._rank, self._world_size = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))

    def arrive(self, where: str) -> None:
        """Waits for all processes.

        Args:
            where: a place in the program, named once.

        Raises:
            UserError: some have not arrived in time, and are named, with the hosts of those that have; or one has
                failed, and said of what: then with its exit code.
            TrainingStoppedError: the process that hosts the store has ended.
        """
        if self._store is not None:
            self._set(where)
            self._wait_for(where, range(self._world_size))

    @contextmanager
    def first_process_first(self, where: str, accelerator: Accelerator) -> Iterator[None]:
        """Holds the other processes back until the first one has left the context.

        As `accelerator.main_process_first`, but that leaves them waiting where the first one fails.

        Raises:
            UserError: as `arrive`.
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
        """Where processes that have all arrived connect to each other.

        Raises:
            UserError: they could not, or one has failed meanwhile.
        """
        message = f"waiting for {self._world_size} processes to connect to each other; giving up after {self._limit}"
        with waiting.told(message, speaks=self._store is not None and self._rank == 0):
            try:
                yield
            except RuntimeError as error:
                if self._store is None or is_initialized():
                    raise
                with _store_there():
                    failure = told_failure(self._store)
                raise failure or ProcessError(
                    f"all {self._world_size} processes have arrived, but this one could not connect to the others: "
                    f"{str(error).splitlines()[0]}. Is the network between the nodes open, and the right interface "
                    f"chosen (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)?"
                ) from error

    def time_all_reduce(self, accelerator: Accelerator) -> None:
        """Times the interconnect; ends the process if that does not answer."""
        if self._store is None:
            return
        watchdog = threading.Timer(self._timeout.total_seconds(), self._give_up)
        watchdog.daemon = True
        watchdog.start()
        numbers = torch.zeros(SIZE, device=accelerator.device)
        seconds = []
        message = f"waiting for an all-reduce between {self._world_size} processes; giving up after {self._limit}"
        with waiting.told(message, speaks=self._rank == 0):
            for _ in range(4):
                start = time.perf_counter()
                all_reduce(numbers)
                float(numbers[0])
                seconds.append(time.perf_counter() - start)
        watchdog.cancel()
        # The first one makes the connections.
        logger.info(
            "%d processes; an all-reduce of %d MiB takes %.1f ms",
            self._world_size,
            SIZE * 4 // 2**20,
            1e3 * statistics.median(seconds[1:]),
        )

    def _set(self, where: str) -> None:
        assert self._store is not None
        with _store_there():
            self._store.set(f"{where}/{self._rank}", socket.gethostname())

    def _wait_for(self, where: str, numbers: Iterable[int]) -> None:
        assert self._store is not None
        deadline = time.monotonic() + self._timeout.total_seconds()
        missing = list(numbers)

        def message() -> str | None:
            if not missing or not self._speaks(missing):
                return None
            return f"waiting for {ranks(missing, self._world_size)} (stage: {where}); giving up after {self._limit}"

        with waiting.told(message, speaks=True), _store_there():
            while missing := [rank for rank in missing if not self._store.check([f"{where}/{rank}"])]:
                if failure := told_failure(self._store):
                    raise failure
                if time.monotonic() > deadline:
                    raise self._not_here(where, missing)
                time.sleep(0.01)

    def _not_here(self, where: str, missing: list[int]) -> UserError:
        assert self._store is not None
        there = [rank for rank in range(self._world_size) if self._store.check([f"{where}/{rank}"])]
        arrived = ", ".join(f"{rank} on {self._store.get(f'{where}/{rank}').decode()}" for rank in there)
        message = (
            f"{ranks(missing, self._world_size)} did not arrive within {self._limit}. Arrived: {arrived or 'none'}. "
            f"See what the missing ones logged last; if they are only slow to start, raise --ddp_timeout."
        )
        return ProcessError(message) if self._speaks(missing) else UserError(message)

    def _speaks(self, missing: list[int]) -> bool:
        """Whether this is the process that says what all of them wait for: the first that is there."""
        return self._rank == next(rank for rank in range(self._world_size) if rank not in missing)

    @property
    def _limit(self) -> str:
        return f"{self._timeout.total_seconds():.0f} s"

    def _give_up(self) -> None:
        if self._rank == 0:
            print(
                f"error: all {self._world_size} processes have arrived, but an all-reduce between them did not end "
                f"within {self._limit}. Is the network between the nodes open, and the right "
                f"interface chosen (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)? NCCL_DEBUG=INFO says more.",
                file=sys.stderr,
                flush=True,
            )
        os._exit(TrainingStoppedError.exit_code)


@contextmanager
def _store_there() -> Iterator[None]:
    """Says in words that the store is gone."""
    try:
        yield
    except DistError as error:
        raise lost() from error
