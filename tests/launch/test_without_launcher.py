"""Launches without a launcher, as PyTorchJob, mpirun and srun make them: variables set for each process by hand."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lora_dist_testing.launching import TIMEOUT, environment, flags, free_port, results_of

SCRIPT = """
import os, signal, sys, time
from datetime import timedelta
from lora_dist import waiting
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes import failure

@exit_on_user_error
def main(rank):
    waiting.AFTER_SECONDS, failure.STARTUP_SECONDS = {after}, {startup}
    with failure.report_failure():
        from lora_dist.processes.preflight import Preflight
        preflight = Preflight(timedelta(seconds={seconds}))
        {main}

run_command(lambda: main(int(os.environ["RANK"])))
"""

WATCHED = """
from pathlib import Path
from lora_dist.processes import watch
from lora_dist.processes.runtime import launch

launch("no", 60)
watch.FIRST_SECONDS = 0
watched = watch.Watch({stall})
watched.watch_peers()
Path(f"ready-{{rank}}").touch()
while not Path(f"ready-{{1 - rank}}").exists():
    time.sleep(0.01)
"""


@contextmanager
def _started_by_hand(
    *command: object, ranks: tuple[int, ...] = (0, 1), world_size: int = 2, cwd: Path | None = None, **extra: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts a command once for each rank; kills what is left of them at the end."""
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=port)
            | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
        )
        for rank in ranks
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _by_hand(*command: object, **options: Any) -> list[tuple[int, str]]:
    """Runs a command once for each rank; returns their exit codes and what they said."""
    with _started_by_hand(*command, **options) as started:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def _wait_for(path: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def _script(path: Path, main: str, **values: float) -> Path:
    path.write_text(SCRIPT.format_map({"seconds": 60, "after": 10, "startup": 30, "main": main} | values))
    return path


def test_two_processes_started_by_hand_train_together(vit: Path, photos: Path, tmp_path: Path) -> None:
    ended = _by_hand(
        "-m",
        "lora_dist.train",
        *flags(
            model_name_or_path=vit,
            train_dir=photos / "train",
            output_dir=tmp_path / "run",
            max_train_steps=2,
            ddp_timeout=60,
        ),
    )
    assert [code for code, _ in ended] == [0, 0], ended
    assert "2 processes; an all-reduce of 4 MiB takes" in ended[0][1]
    assert results_of(tmp_path / "run")["num_processes"] == 2


def test_a_rank_that_never_comes_is_named_first_as_waited_for_and_then_as_missing(tmp_path: Path) -> None:
    script = _script(tmp_path / "script.py", "preflight.arrive('started')", seconds=12, after=4, startup=4)
    one, two = _by_hand(script, ranks=(0, 2), world_size=4)
    assert [one[0], two[0]] == [2, 2], (one, two)
    host = socket.gethostname()
    assert "waiting for ranks 1, 3 of 4 (stage: started); giving up after 12 s (" in one[1]
    assert f"error: ranks 1, 3 of 4 did not arrive within 12 s. Arrived: 0 on {host}, 2 on {host}. " in one[1]
    assert "Traceback" not in one[1] + two[1]


def test_a_crash_is_told_with_its_exit_code_by_the_first_rank_as_well(tmp_path: Path) -> None:
    """It hosts the store, and is long done when the other one starts."""
    script = _script(tmp_path / "script.py", "1 / 0 if rank == 0 else preflight.arrive('started')")
    script.write_text("import os, time\ntime.sleep(3 * (os.environ['RANK'] == '1'))\n" + script.read_text())
    one, two = _by_hand(script)
    assert [one[0], two[0]] == [1, 1], (one, two)
    assert f"error: rank 1 on {socket.gethostname()}: rank 0 on {socket.gethostname()} failed: ZeroDivision" in two[1]
    assert "Traceback" not in two[1]


def test_a_first_rank_that_is_killed_leaves_a_sentence_and_the_code_of_a_crash(tmp_path: Path) -> None:
    main = "os.kill(os.getpid(), 9) if rank == 0 and not time.sleep(5) else preflight.arrive('started')"
    one, two = _by_hand(_script(tmp_path / "script.py", main))
    assert [one[0], two[0]] == [-9, 1], (one, two)
    assert "rank 0 has ended or is unreachable; see the log of rank 0 for the reason" in two[1]
    assert "Traceback" not in two[1]
    assert "frame #" not in two[1]


def test_processes_that_meet_and_cannot_connect_say_what_to_look_at(tmp_path: Path) -> None:
    main = "from lora_dist.processes.runtime import launch; launch('no', 60)"
    one, two = _by_hand(_script(tmp_path / "script.py", main), GLOO_SOCKET_IFNAME="no-such-interface")
    assert [one[0], two[0]] == [2, 2], (one, two)
    for _, said in (one, two):
        assert "all 2 processes have arrived, but this one could not connect to the others: " in said
        assert "no-such-interface" in said
        assert "GLOO_SOCKET_IFNAME" in said
        assert "Traceback" not in said


def _watched(directory: Path, main: str, stall: float = 0) -> Path:
    """A script whose ranks have joined and check each other, and then run `main`."""
    lines = (WATCHED.format(stall=stall) + main).strip().splitlines()
    return _script(directory / "script.py", "\n        ".join(lines))


@pytest.mark.parametrize(
    ("main", "said"),
    [
        # Rank 0 is in a collective, waits for rank 1 to load, or hangs.
        ("with watched.watching(): {dies} if rank else torch.distributed.barrier()", r"\(pid \d+\) has died"),
        ("{dies} if rank else preflight.arrive('loaded')", r"\(pid \d+\) has died"),
        ("with watched.watching(): {dies} if rank else time.sleep(600)", r"\(pid \d+\) has died"),
        ("sys.exit(0) if rank else preflight.arrive('loaded')", "failed: exited with 0"),
        ("signal.raise_signal(signal.SIGINT) if rank else preflight.arrive('loaded')", "failed: interrupted"),
    ],
    ids=["in a collective", "while loading", "hangs", "exits", "interrupted"],
)
def test_a_rank_that_ends_ends_the_first_one_within_seconds(main: str, said: str, tmp_path: Path) -> None:
    """Although rank 0 hosts the store, and no launcher has set LOCAL_WORLD_SIZE."""
    body = "import torch\n" + main.replace("{dies}", "os.kill(os.getpid(), 9)")
    with _started_by_hand(_watched(tmp_path, body), cwd=tmp_path) as (first, second):
        second.wait(TIMEOUT)
        start = time.monotonic()
        text = first.communicate(timeout=TIMEOUT)[0]
    assert first.returncode == (130 if "SIGINT" in main else 1), text
    assert re.search(rf"error: rank 1 on {socket.gethostname()} {said}", text), text
    assert time.monotonic() - start < 12, text


def test_a_stall_is_found_although_the_host_of_the_store_is_suspended(tmp_path: Path) -> None:
    body = "with watched.watching():\n    Path(f'watched-{rank}').touch()\n    time.sleep(600)"
    code, text, seconds = _with_suspended_host(_watched(tmp_path, body, stall=3), tmp_path / "watched-0")
    assert code == 124, text
    assert "error: no progress for 3 s (--stall_timeout):\n  rank 1 on " in text
    assert seconds < 25


def _with_suspended_host(script: Path, ready: Path) -> tuple[int, str, float]:
    """Suspends rank 0 once the file `ready` exists; returns the exit code and output of rank 1, and its seconds."""
    with _started_by_hand(script, cwd=script.parent) as (first, second):
        _wait_for(ready)
        first.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        text = second.communicate(timeout=60)[0]
    return second.returncode, text, time.monotonic() - start


def test_a_wait_ends_although_the_host_of_the_store_is_suspended_while_loading(tmp_path: Path) -> None:
    """A request to the store has no timeout of its own."""
    body = "Path(f'waits-{rank}').touch()\nif rank:\n    preflight.arrive('loaded')\ntime.sleep(600)"
    script = _watched(tmp_path, body)
    script.write_text(script.read_text().replace("seconds=60", "seconds=5"))
    code, text, seconds = _with_suspended_host(script, tmp_path / "waits-0")
    assert code == 1, text
    assert "error: rank 1: the store of the launch has not answered within 5 s (stage: loaded). " in text
    assert seconds < 30


def test_a_checkpoint_is_written_to_its_end_although_another_rank_has_died(tmp_path: Path) -> None:
    body = (
        "with watched.watching():\n    if rank:\n        os.kill(os.getpid(), 9)\n"
        "    with watched.writing():\n        time.sleep(8)\n        print('written', flush=True)\n    time.sleep(600)"
    )
    with _started_by_hand(_watched(tmp_path, body), cwd=tmp_path) as (first, second):
        second.wait(TIMEOUT)
        start = time.monotonic()
        text = first.communicate(timeout=60)[0]
    assert first.returncode == 1, text
    assert "written" in text
    assert time.monotonic() - start < 15
