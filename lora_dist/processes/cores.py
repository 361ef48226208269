"""The CPU cores that a process may use: those of its affinity, limited by the CPU quota of its container."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Returns the number of cores that this process may use together with all others under the same limits."""
    # macOS and Windows have no affinity.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(int, cpu_quotas())]))


def cores_per_process() -> int:
    """Returns the number of cores of this machine for each of the processes that were launched on it; may be 0."""
    return available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cpu_quotas() -> Iterator[float]:
    """Yields the CPU quotas of this process's control groups and of the groups around them, in cores (Linux)."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            base = CONTROL_GROUPS / "cpu" if controllers else CONTROL_GROUPS  # version 1, or 2
            # In a container, the path may be the one outside of it. Only the root exists then.
            for directory in (PurePosixPath(group), *PurePosixPath(group).parents):
                quota = _quota(base / directory.relative_to("/"))
                if quota is not None:
                    yield quota


def _quota(group: Path) -> float | None:
    """Returns the quota of one control group (version 2: `cpu.max`, version 1: `cpu.cfs_…`); None without one."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):
        return None  # no such group, or `max`
