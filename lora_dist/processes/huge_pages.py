"""Transparent huge pages for the memory of a command that computes on a CPU."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

GPU_DRIVERS = [Path("/dev/nvidiactl"), Path("/dev/kfd")]
"""Files that exist where the driver of an NVIDIA or AMD GPU is loaded."""

_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.mmap_threshold=1073741824"
_ADDED = {"GLIBC_TUNABLES": _TUNABLES, "LORA_DIST_ON_HUGE_PAGES": "1"}
"""The second is there because the first may be taken away, or have the same value from the user."""


def move_to_huge_pages() -> None:
    """Re-executes the running command, as the same process, with memory in huge pages that free memory stays in.

    Each step of training allocates its activations. What is freed after a step, glibc returns to the system; the next
    step takes new pages, one page fault for each 4 kB. glibc reads what tells it otherwise only when a program starts.
    So this is for commands that have done nothing yet but reading their command line, and only where they are the
    program (`__name__` says so): one that calls a command's `main` would start over amid work of its own.

    Nothing happens on a host with a GPU, unless `ACCELERATE_USE_CPU` is set; where `GLIBC_TUNABLES` is set, be it to
    nothing; under a tracing debugger; and on other systems than Linux.

    Source: https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")
    if not on_cpu and any(map(Path.exists, GPU_DRIVERS)):
        return
    if sys.platform == "linux" and not _ADDED.keys() & os.environ.keys() and sys.gettrace() is None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _ADDED)


def environment_before(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those that `move_to_huge_pages` has added, if it has."""
    added = _ADDED.keys() if _ADDED.items() <= environment.items() else set()
    return {name: value for name, value in environment.items() if name not in added}
