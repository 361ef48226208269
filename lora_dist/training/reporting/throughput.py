"""How fast training is: samples a second, time waited for data, memory."""

import resource
import sys
import time
from collections.abc import Generator, Iterator

import torch

from lora_dist.data.batch import Batch


class ThroughputMeter:
    """Times the updates since the last log: how long they took, and how much of that was waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self.seconds = self.waited = self.own_seconds = 0.0
        self.samples = self.updates = 0

    @property
    def samples_per_second(self) -> float:
        """Over all processes."""
        return self.samples / max(self.seconds, 1e-9)

    def timed(self, stream: Iterator[Batch]) -> Generator[Batch]:
        """The same batches, with the time until each arrives counted as waiting."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield batch

    def start_update(self) -> None:
        """Called before an update."""
        self._started = time.perf_counter()

    def note_own_work(self) -> None:
        """Called where an update begins to wait for the other processes: what it took so far is this process's own."""
        self.own_seconds += time.perf_counter() - self._started

    def end_update(self, samples: int) -> float:
        """Called after it; its loss has been read, so the device has finished. Returns its seconds."""
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.samples += samples
        self.updates += 1
        return seconds


def peak_memory_mb(device: torch.device) -> float:
    """Highest memory use so far: of the CUDA device, or of this process (2**20 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
