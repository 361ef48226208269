"""Transparent huge pages for the memory of a command that computes on a CPU."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

GPU_DRIVERS = [Path("/dev/nvidiactl"), Path("/dev/kfd")]
"""Files that exist where the driver of an NVIDIA or AMD GPU is loaded."""

_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.mmap_threshold=1073741824"
_ADDED = {"GLIBC_TUNABLES": _TUNABLES, "LORA_DIST_ON_HUGE_PAGES": "1"}
"""Variables of a restarted process. The second marks it: users may unset GLIBC_TUNABLES, or set the same value."""


def restart_with_huge_pages() -> None:
    """Re-executes the running command, as the same process, so that glibc takes memory in huge pages and keeps freed
    memory.

    Each training step allocates its activations. By default, glibc returns them to the system after the step, and the
    next step takes new pages, with a page fault for each 4 kB. glibc reads its tunables only when a program starts.
    Call this function only in a command that has done nothing but read its command line, and only under `__name__ ==
    "__main__"`: a program that calls the command's `main` would start over in the middle of its own work.

    The command continues without a restart on a host with a GPU (unless `ACCELERATE_USE_CPU` is set), if
    `GLIBC_TUNABLES` is set (even to an empty text), under a tracing debugger, and on systems other than Linux.

    Source: https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on")
    if not on_cpu and any(map(Path.exists, GPU_DRIVERS)):
        return
    if sys.platform == "linux" and not _ADDED.keys() & os.environ.keys() and sys.gettrace() is None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _ADDED)


def is_restarted() -> bool:
    """Whether `restart_with_huge_pages` has restarted the running command, which has read its command line before."""
    return _has_added(os.environ)


def _has_added(environment: Mapping[str, str]) -> bool:
    return _ADDED.items() <= environment.items()


def environment_before(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables without those that `restart_with_huge_pages` added."""
    added = _ADDED.keys() if _has_added(environment) else set()
    return {name: value for name, value in environment.items() if name not in added}
