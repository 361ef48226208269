"""How many cores a process may use, on this machine, in containers, and on systems without affinity."""

import os
from pathlib import Path

import pytest

from lora_dist.processes import cores
from lora_dist.processes.cores import available_cores, cores_per_process


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 cores, whose control groups are in a directory; `own` names those of this process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def _write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(f"{text}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 64), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_a_quota_limits_the_cores(groups: Path, limit: str, expected: int) -> None:
    """As a pod sees it: its own group is the root. A part of a core more would only be throttled."""
    _write(groups, own="0::/", cpu__max=limit)
    assert available_cores() == expected


def test_the_lowest_quota_of_all_groups_around_the_process_counts(groups: Path) -> None:
    _write(groups, own="0::/jobs/mine")
    _write(groups / "jobs", cpu__max="300000 100000")
    _write(groups / "jobs" / "mine", cpu__max="800000 100000")
    assert available_cores() == 3


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_quotas_of_control_groups_of_version_1(groups: Path, controllers: str) -> None:
    """Docker shows the path of the group outside of the container, inside of which only the root is there."""
    _write(groups, own=f"5:cpuset:/\n4:{controllers}:/docker/1234\n0::/")
    _write(groups / "cpu", cpu__cfs_quota_us="600000", cpu__cfs_period_us="100000")
    assert available_cores() == 6
    _write(groups / "cpu", cpu__cfs_quota_us="-1")
    assert available_cores() == 64


def test_cores_are_shared_among_the_processes_of_a_machine(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(groups, own="0::/", cpu__max="800000 100000")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_process() == 2


def test_systems_without_affinity_and_control_groups_have_all_cores(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS: training, the audit and the cache ended with an AttributeError."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()
