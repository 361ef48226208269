"""Whatever way a training ends, all that it started ends with it, within seconds, with a code and a sentence.

Ways x start methods of workers x numbers of processes, pairwise; the other combinations are marked `slow`.
"""

import re
import signal
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest
from lora_dist_testing.faults import Faults
from lora_dist_testing.launching import Launch, flags, saved_in, started
from lora_dist_testing.tiny import make_folder

SECONDS = 10
"""Within which a run has to end."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and validation images."""
    root = tmp_path_factory.mktemp("pictures")
    make_folder(root / "train", per_class=40)
    make_folder(root / "validation", per_class=10, first=100)
    return root


def _a_worker(launch: Launch, kind: str) -> psutil.Process:
    """One that loads for training: the youngest process of the run."""
    mine = [one for one in launch.processes() if one.pid != launch.process.pid]
    if kind == "forkserver":
        mine = [one for one in mine if one.ppid() != launch.process.pid]
    return max(mine, key=lambda one: one.create_time())


WAYS: dict[str, tuple[int, str]] = {
    "exception": (1, r"RuntimeError"),
    "SystemExit": (0, ""),
    "out of memory": (1, r"MemoryError"),
    "signal": (75, r"stopped: after update \d+ of 100000, which is saved"),
    "unreadable image": (2, r"error: .*cannot read an image.*All updates are saved: --resume_from_checkpoint auto"),
    "killed worker": (1, r"error: .*a DataLoader worker was killed by SIGKILL.*All updates are saved"),
    "hanging worker": (124, r"error: no progress for \d+ s(.|\n)*waiting for micro-batch(.|\n)*most recent call"),
    "killed rank": (1, r"rank 1 on \S+ \(pid \d+\) has died"),
    "killed launcher": (-9, r"stopped: after update \d+ of 100000, which is saved"),
}


def _strike(way: str, launch: Launch, faults: Faults, start: str, processes: int, pictures: Path) -> None:
    last = processes - 1
    strikes: dict[str, Callable[[], Any]] = {
        "exception": lambda: faults.strike("RuntimeError", last),
        "SystemExit": lambda: faults.strike("SystemExit", last),
        "out of memory": lambda: faults.strike("MemoryError", last),
        "signal": lambda: (launch.rank(0) if processes > 1 else launch.process).send_signal(signal.SIGTERM),
        "unreadable image": lambda: [file.unlink() for file in (pictures / "train").rglob("*.png")],
        "killed worker": lambda: _a_worker(launch, start).kill(),
        "hanging worker": lambda: _a_worker(launch, start).suspend(),
        "killed rank": lambda: launch.rank(1).kill(),
        "killed launcher": launch.process.kill,
    }
    strikes[way]()


IN_CI = {
    ("exception", "spawn", 1),
    ("SystemExit", "forkserver", 1),
    ("signal", "spawn", 2),
    ("unreadable image", "forkserver", 2),
    ("killed worker", "fork", 1),
    ("hanging worker", "fork", 2),
    ("killed rank", "forkserver", 2),
    ("killed launcher", "fork", 2),
}
ALONE = ("killed rank", "killed launcher")


def _cases() -> list[Any]:
    return [
        pytest.param(*case, marks=[] if case in IN_CI else pytest.mark.slow, id=" ".join(map(str, case)))
        for case in product(WAYS, ("fork", "spawn", "forkserver"), (1, 2))
        if not (case[0] in ALONE and case[2] == 1)
    ]


@pytest.mark.parametrize(("way", "start", "processes"), _cases())
def test_a_run_ends_with_all_that_it_started(
    way: str, start: str, processes: int, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    make_folder(photos / "train", per_class=40)
    out, faults = tmp_path / "run", Faults(tmp_path / "faults")
    arguments = flags(
        model_name_or_path=vit,
        train_dir=photos / "train",
        validation_dir=pictures / "validation",
        output_dir=out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_train_steps=100_000,
        eval_steps="no",
        checkpointing_steps="no",
        logging_steps=1,
        # Each imports everything anew with "spawn".
        dataloader_num_workers=1 if start == "spawn" else 2,
        stall_timeout=4 if way == "hanging worker" else 60,
    )
    launch_file = "ddp_cpu.yaml" if processes > 1 else None
    with started(tmp_path / "log", *arguments, launch_file=launch_file, **faults.environment(start)) as launch:
        launch.wait_for(lambda: "step 3/" in launch.text)
        _strike(way, launch, faults, start, processes, photos)
        struck = time.monotonic()
        code = launch.wait(60)
        seconds = time.monotonic() - struck
    expected, said = WAYS[way]
    if way == "SystemExit" and processes > 1:
        # The others cannot go on without it, so the launch has failed.
        expected, said = 1, r"rank 1 on \S+ \(pid \d+\) has died"
    # torchrun makes every failure of a rank a 1, and names the code that it ended with.
    if processes == 1 or expected < 0:
        assert code == expected, launch.text
    else:
        assert code == (1 if expected else 0), launch.text
        if expected:
            assert re.search(rf"exitcode  : {expected} ", launch.text), launch.text
    assert re.search(said, launch.text), launch.text
    assert seconds < SECONDS + (4 if way == "hanging worker" else 0), launch.text
    assert launch.processes() == []
    if "is saved" in said or "are saved" in said:
        assert saved_in(out)["step"] >= 3
