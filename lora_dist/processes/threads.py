"""The number of threads of torch on a CPU: the process's share of the cores, unless the user has set a number."""

import logging
import os
from pathlib import Path

import torch

from lora_dist.processes.cores import cores_per_process

logger = logging.getLogger(__name__)

LAUNCHERS = ("accelerate", "torch.distributed.run", "torchrun")


def share_cores() -> None:
    """Makes torch use this process's share of the cores.

    Without OMP_NUM_THREADS, torch knows neither the other processes of the launch nor the CPU quota of a container.
    Launchers set it to 1.
    """
    variables = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    if variables and not (variables == {"OMP_NUM_THREADS"} and _set_by_launcher(os.getppid())):
        return
    share = max(1, cores_per_process())
    threads = share if variables else min(share, torch.get_num_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
        logger.info("each process computes on %d threads, its share of the cores; OMP_NUM_THREADS overrides", threads)


def _set_by_launcher(parent: int) -> bool:
    """Whether a launcher has set OMP_NUM_THREADS, rather than the user; False if that is unknown."""
    try:
        started_with, command = (
            (Path("/proc") / str(parent) / name).read_bytes().decode(errors="replace").split("\0")
            for name in ("environ", "cmdline")
        )
    except OSError:
        return False
    is_launcher = any(name in word for word in command[:3] for name in LAUNCHERS)
    told = any(word.startswith("OMP_NUM_THREADS=") for word in started_with) or any(
        "num_cpu_threads_per_process" in word.replace("-", "_") for word in command
    )
    return is_launcher and not told
