"""Huge pages for the memory of a command that computes on a CPU."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = "GLIBC_TUNABLES"
_KEEP_IN_HUGE_PAGES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.mmap_threshold=33554432"
)
GPU_DRIVERS = [Path("/dev/nvidiactl"), Path("/dev/kfd")]
"""What is there where CUDA's or ROCm's driver is loaded."""


def move_to_huge_pages() -> None:
    """Has the running command start over, in the same process, with memory of huge pages that it keeps when it is free.

    Each step of training needs memory for its activations. What is free after a step, glibc gives back to the system;
    the next step meets new pages, one page fault for each 4 kB. glibc reads what tells it otherwise only when a program
    starts. So this is to be called when nothing has been done yet but reading the command line.

    Nothing happens where a GPU computes, which has memory of its own; where `GLIBC_TUNABLES` is set, be it to nothing;
    in a debugger; and on other systems than Linux.

    Source: https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
    """
    on_gpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" and any(map(Path.exists, GPU_DRIVERS))
    if sys.platform != "linux" or _VARIABLE in os.environ or on_gpu or sys.gettrace() is not None:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {_VARIABLE: _KEEP_IN_HUGE_PAGES})


def environment_before(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without the one that `move_to_huge_pages` adds."""
    return {name: value for name, value in environment.items() if (name, value) != (_VARIABLE, _KEEP_IN_HUGE_PAGES)}
