"""Workers of a loader that die, hang or find no room are named, with what to do."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import flags
from torch.utils.data import Dataset

from lora_dist.errors import UserError
from lora_dist.processes import workers
from lora_dist.processes.workers import WorkerDiedError, from_workers, require_shared_memory, worker_loader


class Items(Dataset):
    """Eight numbers; what happens in a worker at the fifth is given by name."""

    def __init__(self, event: str) -> None:
        self.event = event

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 4:
            events: dict[str, Any] = {
                "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
                "no room": lambda: os.kill(os.getpid(), signal.SIGBUS),
                "crashes": lambda: ctypes.string_at(0),
                "hangs": lambda: time.sleep(600),
                "raises": lambda: 1 / 0,
                "is fine": lambda: None,
            }
            events[self.event]()
        return torch.tensor(index)


def _loaded(event: str, silent_seconds: float | None = None) -> list[int]:
    options = {} if silent_seconds is None else {"timeout": 0.5}
    loader = worker_loader(Items(event), workers=2, batch_size=None, **options)
    return [int(found) for found in from_workers(loader, silent_seconds)]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ("killed", r"killed by SIGKILL, .* lower --dataloader_num_workers"),
        ("no room", r"killed by SIGBUS: /dev/shm was full, or the file system of .*--cache_dir.*--shm-size"),
        ("crashes", "terminated by SIGSEGV"),
    ],
)
def test_a_worker_that_dies_is_a_sentence_with_the_way_out(event: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match=said) as end:
        _loaded(event)
    assert end.value.exit_code == 1
    assert time.monotonic() - start < 10


def test_a_bus_error_is_blamed_on_dev_shm_alone_where_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "free_bytes", lambda _: 0)
    said = r"ran out of space in /dev/shm\. .*--shm-size or --ipc=host.*--dataloader_num_workers"
    with pytest.raises(WorkerDiedError, match=said):
        _loaded("no room")


def test_a_worker_that_hangs_is_a_sentence_after_a_time() -> None:
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match="no longer deliver batches"):
        _loaded("hangs", silent_seconds=1)
    assert time.monotonic() - start < 5


def test_other_errors_stay_as_they_are_and_healthy_workers_deliver_in_order() -> None:
    with pytest.raises(ZeroDivisionError):
        _loaded("raises")
    assert _loaded("is fine") == list(range(8))


def test_what_happens_on_the_death_of_a_child_is_left_as_it_was() -> None:
    """Torch's own handler would raise wherever the program is."""
    before = signal.getsignal(signal.SIGCHLD)
    _loaded("is fine")
    assert signal.getsignal(signal.SIGCHLD) is before


def test_workers_that_stay_are_those_of_the_first_pass() -> None:
    class Pids(Items):
        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.tensor(os.getpid())

    loader = worker_loader(Pids("is fine"), workers=2, batch_size=None, persistent_workers=True)
    first, second = ({int(pid) for pid in from_workers(loader)} for _ in range(2))
    assert first == second
    assert len(first) == 2


def test_room_for_the_batches_is_asked_for_before() -> None:
    require_shared_memory(1)
    with pytest.raises(UserError, match=r"/dev/shm has .* free, but the DataLoader workers need 1000\.0 TB for"):
        require_shared_memory(10**15)


@pytest.mark.root
def test_a_small_dev_shm_is_said_before_training_with_both_sizes(vit: Path, photos: Path, tmp_path: Path) -> None:
    """A real one of 64 kB, and a real run; the control has room."""
    words = [
        sys.executable,
        "-m",
        "lora_dist.train",
        *flags(
            model_name_or_path=vit,
            train_dir=photos / "train",
            validation_dir=photos / "validation",
            per_device_train_batch_size=8,
            max_train_steps=1,
            dataloader_num_workers=2,
            per_device_eval_batch_size=128,
        ),
        "--output_dir",
    ]

    def run(size: str, out: Path) -> subprocess.CompletedProcess[str]:
        inner = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", inner, "sh", *map(str, words), str(out)]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("cannot mount here")
    small = run("64k", tmp_path / "small")
    assert small.returncode == 2, small.stderr
    # 2 workers x 4 batches x (8 + 128) images of 3 x 32 x 32 bytes, and their labels, weights and indices.
    found = re.search(r"/dev/shm has 6\d kB free, but the DataLoader workers need ([\d.]+) MB for", small.stderr)
    assert found is not None, small.stderr
    assert 0.95 < float(found.group(1)) * 1e6 / (2 * 4 * (8 + 128) * 3 * 32 * 32) < 1.1
    assert "--shm-size" in small.stderr
    assert not (tmp_path / "small" / "config.yaml").exists()
    assert run("64m", tmp_path / "large").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_that_stay_may_be_slow_to_wake_up_and_are_named_if_they_have_died(number: signal.Signals) -> None:
    """Between two evaluations, say."""
    loader = worker_loader(Items("is fine"), workers=2, batch_size=None, persistent_workers=True)
    assert len(list(from_workers(loader))) == 8
    worker = loader._iterator._workers[0]
    os.kill(worker.pid, number)
    if number == signal.SIGKILL:
        with pytest.raises(WorkerDiedError, match="SIGKILL"):
            list(from_workers(loader))
    else:
        threading.Timer(6, os.kill, (worker.pid, signal.SIGCONT)).start()
    assert len(list(from_workers(loader))) == 8
