"""A run in which nothing moves says what it was doing, shows its stacks, and ends with a code of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
from lora_dist.processes import watch
from lora_dist.processes.lifetime import run_command

watch.FIRST_SECONDS = float(sys.argv[2])
watched = watch.Watch(float(sys.argv[1]))
watched.resume_hint = "go on from update 4"

def sleeping(seconds):
    time.sleep(seconds)

def main():
    with watched.watching():
        for number in range(3):
            watched.enter(f"update {number}: computing")
            time.sleep(0.3)
            watched.end_warm_up()
        watched.enter("update 3: waiting for micro-batch 7")
        sleeping(float(sys.argv[3]))
    print("done", flush=True)

run_command(main)
"""


def _run(directory: Path, *arguments: float) -> tuple[subprocess.CompletedProcess[str], float]:
    (directory / "script.py").write_text(SCRIPT, encoding="utf-8")
    start = time.monotonic()
    words = [sys.executable, directory / "script.py", *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    return result, time.monotonic() - start


def test_a_stall_ends_with_what_was_going_on_and_all_stacks(tmp_path: Path) -> None:
    result, seconds = _run(tmp_path, 1.0, 0, 60)
    assert result.returncode == 124
    assert "error: no progress for 1 s (--stall_timeout):\n  rank 0 on " in result.stderr
    assert "for 1 s: update 3: waiting for micro-batch 7\ngo on from update 4" in result.stderr
    assert "in sleeping" in result.stderr
    assert "done" not in result.stdout
    assert seconds < 10


@pytest.mark.parametrize("arguments", [(0, 0, 1.5), (1.0, 0, 0.5)], ids=["turned off", "it moves"])
def test_a_run_that_moves_or_is_not_watched_goes_on(arguments: tuple[float, ...], tmp_path: Path) -> None:
    result, _ = _run(tmp_path, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


STEP = """
import sys, time
from lora_dist.processes import watch
from lora_dist.processes.lifetime import run_command

watch.FIRST_SECONDS = 0.0

def main():
    with watch.Watch(0.5).watching_step("reading images"):
        time.sleep(float(sys.argv[1]))
    time.sleep(1.5)
    print("done", flush=True)

run_command(main)
"""


@pytest.mark.parametrize(("seconds", "code"), [(0.1, 0), (30, 124)])
def test_a_step_before_the_loop_is_watched_too(seconds: float, code: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STEP, encoding="utf-8")
    words = [sys.executable, tmp_path / "script.py", str(seconds)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == code, result.stderr
    assert (": reading images" in result.stderr) == bool(code)


def test_what_comes_first_may_take_longer(tmp_path: Path) -> None:
    """Each of the three updates takes longer than the time-out: the first may, the second not."""
    result, _ = _run(tmp_path, 0.2, 5, 0)
    assert result.returncode == 124
    assert "update 1: computing" in result.stderr


def test_a_process_that_was_suspended_has_not_stalled(tmp_path: Path) -> None:
    """By a scheduler that gives its cores to another job, or by Ctrl-Z."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    words = [sys.executable, tmp_path / "script.py", "2", "0", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(1.2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error) == (0, "done\n", "")
