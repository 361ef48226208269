"""Measures throughput, the time spent waiting for data, and memory."""

import resource
import sys
import time
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


class ThroughputMeter:
    """Measures the updates since the last log: their time, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new measurement."""
        self.seconds = self.waited = self.own_seconds = 0.0
        self.samples = self.updates = 0

    @property
    def samples_per_second(self) -> float:
        """Samples per second over all processes."""
        return self.samples / max(self.seconds, 1e-9)

    def timed(self, loaded: Iterator[T]) -> Generator[T]:
        """Yields the items of worker processes, and counts the time until each arrives as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                found = next(loaded)
            except StopIteration:
                return
            self.waited += time.perf_counter() - start
            yield found

    def start_update(self) -> None:
        """Called before an update."""
        self._started = time.perf_counter()

    def note_own_work(self) -> None:
        """Called when an update starts to wait for other processes. The time so far is this process's own."""
        self.own_seconds += time.perf_counter() - self._started

    def end_update(self, samples: int) -> float:
        """Called after an update whose loss has been read, so that the device has finished. Returns its seconds."""
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        self.samples += samples
        self.updates += 1
        return seconds


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, in MiB: of the CUDA device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
