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
from torch.distributed import DistNetworkError, all_reduce

from lora_dist.errors import ProcessError, TrainingStoppedError, UserError
from lora_dist.processes.failure import launch_store, told_failure

logger = logging.getLogger(__name__)

SIZE = 2**20
"""Numbers in the all-reduce that is timed, 4 MiB: about the gradient of LoRA on a ViT-L."""


class Preflight:
    """Lets no process go on before all have arrived, and says which have not.

    It needs the store of torchrun, through which `accelerate launch` starts more than one process, and does nothing
    elsewhere.
    """

    def __init__(self, timeout: timedelta) -> None:
        """
        Args:
            timeout: to wait for the slowest process.
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
                failed, and said of what.
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
            with accelerator.main_process_first():
                yield
            return
        if self._rank:
            self._wait_for(where, [0])
        yield
        self._set(where)

    def time_all_reduce(self, accelerator: Accelerator) -> None:
        """Times the interconnect; ends the process if that does not answer."""
        if self._store is None:
            return
        watchdog = threading.Timer(self._timeout.total_seconds(), self._give_up)
        watchdog.daemon = True
        watchdog.start()
        numbers = torch.zeros(SIZE, device=accelerator.device)
        seconds = []
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
        self._store.set(f"{where}/{self._rank}", socket.gethostname())

    def _wait_for(self, where: str, ranks: Iterable[int]) -> None:
        assert self._store is not None
        deadline = time.monotonic() + self._timeout.total_seconds()
        missing = list(ranks)
        try:
            while missing := [rank for rank in missing if not self._store.check([f"{where}/{rank}"])]:
                if failure := told_failure(self._store):
                    raise UserError(failure)
                if time.monotonic() > deadline:
                    raise self._not_here(where, missing)
                time.sleep(0.01)
        except DistNetworkError as error:
            raise UserError("the launcher on the first node has ended; its log says why") from error

    def _not_here(self, where: str, missing: list[int]) -> UserError:
        assert self._store is not None
        there = [rank for rank in range(self._world_size) if self._store.check([f"{where}/{rank}"])]
        arrived = ", ".join(f"{rank} on {self._store.get(f'{where}/{rank}').decode()}" for rank in there)
        message = (
            f"rank {', '.join(map(str, missing))} of {self._world_size} did not arrive within "
            f"{self._timeout.total_seconds():.0f} s. Arrived: {arrived or 'none'}. See what the missing ones logged "
            f"last; if they are only slow to start, raise --ddp_timeout."
        )
        speaker = next(rank for rank in range(self._world_size) if rank not in missing)
        return ProcessError(message) if self._rank == speaker else UserError(message)

    def _give_up(self) -> None:
        if self._rank == 0:
            print(
                f"error: all {self._world_size} processes have arrived, but an all-reduce between them did not end "
                f"within {self._timeout.total_seconds():.0f} s. Is the network between the nodes open, and the right "
                f"interface chosen (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)? NCCL_DEBUG=INFO says more.",
                file=sys.stderr,
                flush=True,
            )
        os._exit(TrainingStoppedError.exit_code)
