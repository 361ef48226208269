"""A command ends with all that it started, in bounded time, with the right exit code, whatever way it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

START = """
import multiprocessing, signal, sys, threading, time
from pathlib import Path
from lora_dist.processes import lifetime

def stubborn(file):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(file).touch()
    time.sleep(600)

def start_all(file, method):
    "A child process that ignores SIGTERM, and a thread that the interpreter would wait for."
    multiprocessing.get_context(method).Process(target=stubborn, args=(file,), daemon=True).start()
    threading.Thread(target=time.sleep, args=(600,)).start()
    while not Path(file).exists():
        time.sleep(0.01)
"""


def _run(directory: Path, body: str, method: str = "fork") -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a command, a function `main` with this body, after it has started a child and a thread.

    Returns:
        What it printed, and the seconds that its end took.
    """
    script = directory / "command.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    begun = f"    start_all({str(directory / 'child')!r}, {method!r})\n    print('begun', time.time(), flush=True)"
    script.write_text(
        f"{START}\ndef main():\n{begun}\n{lines}\n\nif __name__ == '__main__':\n    lifetime.run_command(main)\n",
        encoding="utf-8",
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    took = time.time() - float(result.stdout.split()[1])
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(script) in (one.info["cmdline"] or [])]
    return result, took


@pytest.mark.parametrize(
    ("body", "code", "said", "method"),
    [
        ("return", 0, "", "fork"),
        ("sys.exit(7)", 7, "", "spawn"),
        ("sys.exit('no such thing')", 1, "no such thing\n", "fork"),
        ("raise ZeroDivisionError('odd')", 1, "ZeroDivisionError: odd", "forkserver"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt", "fork"),
    ],
)
def test_every_way_out_ends_children_and_threads_at_once(
    body: str, code: int, said: str, method: str, tmp_path: Path
) -> None:
    result, took = _run(tmp_path, body, method)
    assert result.returncode == code
    assert said in result.stderr
    assert ("Traceback" in result.stderr) == body.startswith("raise")
    assert took < 5


def test_cleanups_run_once_in_reverse_order_and_output_is_flushed(tmp_path: Path) -> None:
    """One that fails does not keep the others from running. Exit handlers of other packages run as well."""
    body = (
        "import atexit\natexit.register(print, 'exit handler')\nlifetime.at_end(lambda: print('first'))\n"
        "lifetime.at_end(lambda: 1 / 0)\nlifetime.at_end(lambda: print('last'))\nsys.stdout.write('unflushed ')"
    )
    result, _ = _run(tmp_path, body)
    assert result.returncode == 0
    assert result.stdout.splitlines()[1:] == ["unflushed last", "first", "exit handler"]
    assert "ZeroDivisionError" in result.stderr


def test_a_cleanup_that_hangs_is_given_up(tmp_path: Path) -> None:
    result, took = _run(tmp_path, "lifetime.at_end(lambda: time.sleep(600))\nsys.exit(3)")
    assert result.returncode == 3
    assert "cleaning up took longer than 8 s" in result.stderr
    assert 7 < took < 12


def test_output_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    code = "from lora_dist.processes.lifetime import run_command\nrun_command(lambda: print('x' * 9))"
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    assert result.returncode == 120
    assert "cannot write to standard output" in result.stderr


def test_a_terminal_of_another_encoding_shows_escapes(tmp_path: Path) -> None:
    code = "from lora_dist.processes.lifetime import run_command\nrun_command(lambda: print('rosé'))"
    shown = subprocess.check_output(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=60
    )
    assert shown == rb"ros\xe9" + b"\n"


def test_closed_standard_streams_get_no_files_of_the_command(tmp_path: Path) -> None:
    """Text for a closed stream would go into the file that got its descriptor."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys\nfrom lora_dist.processes.lifetime import run_command\ndef main():\n"
        "    with open('result', 'w') as file:\n        print('a line')\n"
        "        os.system('echo another; echo third >&2')\n        file.write(f'{file.fileno()}')\n"
        "run_command(main)\n",
        encoding="utf-8",
    )
    closing = f"exec {sys.executable} command.py <&- >&- 2>&-"
    result = subprocess.run(["sh", "-c", closing], cwd=tmp_path, check=False, timeout=60)
    assert result.returncode == 0
    assert int((tmp_path / "result").read_text(encoding="utf-8")) > 2


def test_a_signal_shows_the_stacks_of_all_threads_and_the_command_goes_on(tmp_path: Path) -> None:
    body = "import os\nos.kill(os.getpid(), signal.SIGQUIT)\ntime.sleep(0.5)\nprint('went on')"
    result, _ = _run(tmp_path, body)
    assert result.returncode == 0
    assert result.stdout.endswith("went on\n")
    assert result.stderr.count("most recent call first") == 2
    assert "in main" in result.stderr


def test_children_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    """Nothing of it runs any more, so the kernel ends them."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, time\nfrom lora_dist.processes.workers import from_workers, worker_loader\n"
        "class Slow:\n    def __len__(self):\n        return 9\n    def __getitem__(self, index):\n"
        "        open(f'worker-{os.getpid()}', 'w').close()\n        time.sleep(600)\n"
        "next(from_workers(worker_loader(Slow(), workers=2)))\n",
        encoding="utf-8",
    )
    with subprocess.Popen([sys.executable, script], cwd=tmp_path) as process:
        while len(started := list(tmp_path.glob("worker-*"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    pids = [int(file.name.partition("-")[2]) for file in started]
    end = time.monotonic() + 5
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def _full_pipe() -> tuple[int, int]:
    """A pipe that nobody reads, as into a `tee` that hangs."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    return reading, writing


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("raise ZeroDivisionError", 1),
        ("raise UserError('no such file')", 2),
        ("stalled.enter('hangs')\nstalled.end_warm_up()\nwith stalled.watching(): time.sleep(600)", 124),
    ],
)
def test_a_command_ends_although_standard_error_blocks(body: str, code: int, tmp_path: Path) -> None:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (tmp_path / "command.py").write_text(
        "import time\nfrom lora_dist.errors import UserError\nfrom lora_dist.processes import lifetime, watch\n"
        "lifetime.GRACE_SECONDS = watch.GRACE_SECONDS = watch.ANSWER_SECONDS = 1\nwatch.FIRST_SECONDS = 0\n"
        f"stalled = watch.Watch(0.5)\n@lifetime.exit_on_user_error\ndef main():\n{lines}\nlifetime.run_command(main)\n",
        encoding="utf-8",
    )
    pipe = _full_pipe()
    try:
        result = subprocess.run([sys.executable, tmp_path / "command.py"], stderr=pipe[1], timeout=60, check=False)
    finally:
        for end in pipe:
            os.close(end)
    assert result.returncode == code


@pytest.mark.parametrize("early", [True, False], ids=["before the import", "after the import"])
def test_a_launcher_that_is_already_dead_is_noticed(early: bool, tmp_path: Path) -> None:
    """A process that starts as its launcher is killed gets no signal for that from the kernel."""
    if early and "python" in Path("/proc/1/cmdline").read_text(encoding="utf-8"):
        pytest.skip("process 1 might be a launcher")
    child = "import os, sys, time\n" + ("" if early else "from lora_dist.processes import parent_death\n")
    child += (
        "open('started', 'w').close()\n"
        "while os.getppid() == int(sys.argv[1]):\n    time.sleep(0.01)\n"
        "from lora_dist.processes import parent_death\nparent_death.end_with_launcher()\nopen('alive', 'w').close()\n"
    )
    (tmp_path / "child.py").write_text(child, encoding="utf-8")
    parent = (
        "import os, subprocess, sys, time\nchild = subprocess.Popen([sys.executable, 'child.py', str(os.getpid())])\n"
        "while not os.path.exists('started'):\n    time.sleep(0.01)\nprint(child.pid)"
    )
    launched = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_MODE": "default"}
    words = [sys.executable, "-c", parent]
    pid = int(subprocess.check_output(words, cwd=tmp_path, env=launched, text=True, timeout=60))
    end = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (tmp_path / "alive").exists()
