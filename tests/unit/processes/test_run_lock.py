"""The lock of an output directory: of one process, released with it, and told about where it cannot work."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_dist.errors import UserError
from lora_dist.processes import run_lock
from lora_dist.processes.run_lock import LOCK, RunLock
from lora_dist.processes.runtime import launch
from lora_dist.training.launching import lock_output

FORK = multiprocessing.get_context("fork")


def _take(root: Path, ddp_timeout: int = 1800) -> RunLock:
    lock = RunLock()
    lock_output(lock, root, launch("no"), ddp_timeout)
    return lock


def _hold(root: Path, ready: Any, host: str) -> None:
    socket.gethostname = lambda: host
    _take(root)
    ready.set()
    time.sleep(600)


@contextmanager
def _held(root: Path, host: str = "") -> Iterator[Any]:
    """Another process that holds the lock of a directory, on a machine of that name."""
    ready = FORK.Event()
    process = FORK.Process(target=_hold, args=(root, ready, host or socket.gethostname()))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_the_lock_is_released_and_a_directory_that_stays_empty_goes_with_it(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "new"
    lock = _take(root)
    assert json.loads((root / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())
    with _held(root):
        assert (root / LOCK).exists()


def test_files_of_a_run_and_a_directory_that_was_there_stay(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for root in (tmp_path / "there", tmp_path / "made"):
        lock = _take(root)
        if root.name == "made":
            (root / "config.yaml").touch()
        lock.release()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.yaml", "made", "there"]


def test_the_lock_of_another_run_in_a_directory_made_anew_stays(tmp_path: Path) -> None:
    lock = _take(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with _held(tmp_path / "run"):
        lock.release()
        assert _is_refused(tmp_path / "run")


def test_a_worker_process_does_not_take_the_lock_with_it(tmp_path: Path) -> None:
    """Neither does its end release the lock, nor does it hold the lock when its parent is gone."""
    lock = _take(tmp_path)
    worker = FORK.Process(target=lambda: None)
    worker.start()
    worker.join()
    assert _is_refused(tmp_path)
    sleeper = FORK.Process(target=time.sleep, args=(60,))
    sleeper.start()
    lock.release()
    assert not _is_refused(tmp_path)
    sleeper.kill()
    sleeper.join()


def _is_refused(root: Path) -> bool:
    """Whether another process is refused."""

    def run() -> None:
        run_lock.SAME_HOST_SECONDS = 0.5
        try:
            _take(root)
        except UserError:
            os._exit(3)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, 3)
    return process.exitcode == 3


@pytest.mark.parametrize("host", ["", "node7"])
def test_whoever_waits_goes_on_when_the_holder_dies(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _held(tmp_path, host) as holder:
        FORK.Process(target=_kill_later, args=(holder.pid,)).start()
        lock = _take(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    said = capsys.readouterr().err
    assert f"in use by another run: process {holder.pid} on {host or socket.gethostname()}, started 20" in said
    assert f"Waiting up to {100 if host else 5} s" in said


def _kill_later(pid: int) -> None:
    time.sleep(1)
    os.kill(pid, 9)


def test_a_holder_that_lives_on_another_machine_is_an_error_after_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "SAME_HOST_SECONDS", 0.2)
    with _held(tmp_path, "node7") as holder:
        start = time.monotonic()
        with pytest.raises(UserError, match=rf"is in use by another run: process {holder.pid} on node7, started 20"):
            _take(tmp_path, ddp_timeout=2)
        assert 1 <= time.monotonic() - start < 2


def test_a_run_that_waited_holds_the_lock_of_the_next_file_and_not_of_the_removed_one(tmp_path: Path) -> None:
    lock = _take(tmp_path)
    old = (tmp_path / LOCK).stat().st_ino
    opened = (tmp_path / LOCK).open()  # keeps the number of the file in use
    ready = FORK.Event()
    waiting = FORK.Process(target=_hold, args=(tmp_path, ready, socket.gethostname()))
    waiting.start()
    time.sleep(0.5)
    assert not ready.is_set()
    lock.release()
    assert ready.wait(10)
    assert (tmp_path / LOCK).stat().st_ino != old
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == waiting.pid
    assert _is_refused(tmp_path)
    waiting.kill()
    waiting.join()
    opened.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_no_obstacle(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    launch("no")
    monkeypatch.setattr(fcntl, "lockf", fails)
    lock = _take(tmp_path)
    assert (
        f"cannot be locked, because its file system does not support locks ({os.strerror(number)})"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
    lock.release()


@pytest.mark.parametrize(
    ("options", "local"),
    [
        ("rw,vers=3,hard,proto=tcp,nolock,local_lock=all,addr=10.0.0.1", True),
        ("rw,vers=3,hard,proto=tcp,local_lock=none,addr=10.0.0.1", False),
        ("rw,vers=4.2,hard,proto=tcp,clientaddr=10.0.0.2,local_lock=none,addr=10.0.0.1", False),
        ("rw,localflock,lazystatfs", True),
        ("rw,flock,lazystatfs", False),
    ],
)
def test_mounts_that_keep_locks_to_one_machine_are_known(options: str, local: bool) -> None:
    mounts = (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,nolock\n"
        f"97 22 0:51 / /scratch rw,relatime shared:54 - nfs server:/scratch {options}\n"
    )
    assert run_lock._locks_are_local(mounts, os.makedev(0, 51)) == local


def test_this_machine_has_a_mount_of_the_directory(tmp_path: Path) -> None:
    """So that the line of a device is found where it is looked for."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    device = tmp_path.stat().st_dev
    marked = "\n".join(f"{line},nolock" for line in mounts.splitlines())
    assert not run_lock._locks_are_local(mounts, device)
    assert run_lock._locks_are_local(marked, device)
