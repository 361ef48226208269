"""Whether all processes of a launch arrive and reach each other, found out before anything costly is loaded."""

import logging
import os
import socket
import statistics
import sys
import threading
import time
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch.distributed import Store, all_reduce, rendezvous

from lora_dist.errors import ProcessError, TrainingStoppedError, UserError

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
        self._store: Store | None = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ["WORLD_SIZE"]) > 1:
            self._store, self._rank, self._world_size = next(rendezvous("env://", timeout=timeout))

    def arrive(self, where: str) -> None:
        """Waits for all processes.

        Args:
            where: a place in the program, named once.

        Raises:
            UserError: some have not arrived in time; they are named, with the hosts of those that have.
        """
        if self._store is None:
            return
        self._store.set(f"{where}/{self._rank}", socket.gethostname())
        deadline = time.monotonic() + self._timeout.total_seconds()
        missing = list(range(self._world_size))
        while missing := [rank for rank in missing if not self._store.check([f"{where}/{rank}"])]:
            if time.monotonic() > deadline:
                raise self._not_here(where, missing)
            time.sleep(0.01)

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

    def _not_here(self, where: str, missing: list[int]) -> UserError:
        assert self._store is not None
        arrived = [rank for rank in range(self._world_size) if rank not in missing]
        hosts = ", ".join(f"{rank} on {self._store.get(f'{where}/{rank}').decode()}" for rank in arrived)
        message = (
            f"rank {', '.join(map(str, missing))} of {self._world_size} did not arrive within "
            f"{self._timeout.total_seconds():.0f} s. Arrived: {hosts}. See what the missing ones logged last; if they "
            f"are only slow to start, raise --ddp_timeout."
        )
        return ProcessError(message) if self._rank == arrived[0] else UserError(message)

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
