"""Requests from outside are heard while a run listens, once each, and at no other time."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_dist.processes.preemption import Preemption, StopRequested
from lora_dist.processes.runtime import launch
from lora_dist.processes.signals import STOP_SIGNALS
from lora_dist.processes.workers import set_up_worker

pytestmark = pytest.mark.usefixtures("handlers")


@pytest.fixture
def preemption(tmp_path: Path) -> Preemption:
    return Preemption(launch("no"), tmp_path / "SAVE")


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.2)  # until it has been read


def _signalled(preemption: Preemption, number: int) -> None:
    """A run that is sent a signal."""
    with preemption.listening():
        _send(number)
        preemption.check()


def test_nothing_asked_is_nothing_to_do(preemption: Preemption) -> None:
    with preemption.listening():
        assert not preemption.check()
    assert not preemption.check()


def test_a_file_asks_for_a_checkpoint_until_there_is_one(preemption: Preemption, tmp_path: Path) -> None:
    (tmp_path / "SAVE").touch()
    assert preemption.check()
    assert preemption.check()
    preemption.clear_save_request()
    assert not preemption.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_to_stop_and_is_named(
    number: signal.Signals, preemption: Preemption, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(StopRequested):
        _signalled(preemption, number)
    what = "saving and stopping after this update; a second signal ends the process at once"
    assert caplog.messages == [f"{number.name}: {what}"]


def test_what_other_signals_do_stays_as_it_was(preemption: Preemption) -> None:
    """PyTorch has one of its own for the death of a worker, and it wakes the listener too."""
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda number, _: heard.append(number))
    with preemption.listening():
        _send(signal.SIGCHLD)
        assert not preemption.check()
    signal.signal(signal.SIGCHLD, before)
    assert heard == [signal.SIGCHLD]


def test_signals_do_afterwards_what_they_did_before(preemption: Preemption) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    open_files = _open_files()
    with preemption.listening():
        assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == wakeup == -1
    assert _open_files() == open_files


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_listened_to_twice_is_heard_twice(preemption: Preemption) -> None:
    with preemption.listening():
        assert not preemption.check()
    with pytest.raises(StopRequested):
        _signalled(preemption, signal.SIGUSR2)


def test_a_process_that_is_about_to_exit_is_not_ended_by_a_late_signal(
    preemption: Preemption, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher sends one to the processes that are slower than the first."""
    monkeypatch.setattr("lora_dist.processes.preemption.owns_process", lambda: True)
    with pytest.raises(StopRequested):
        _signalled(preemption, signal.SIGTERM)
    assert {signal.getsignal(number) for number in STOP_SIGNALS} == {signal.SIG_IGN}


def test_a_notebook_hears_signals_after_a_run_that_was_stopped(preemption: Preemption) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(StopRequested):
        _signalled(preemption, signal.SIGINT)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_listening_ends_while_a_worker_lives(preemption: Preemption) -> None:
    """Having been forked from here, it holds all that was open, and an error on its way up keeps it alive."""
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    start = time.monotonic()
    with preemption.listening():
        worker.start()
    assert time.monotonic() - start < 10
    worker.kill()
    worker.join()


def test_a_helper_outlives_the_signals() -> None:
    def helper() -> None:
        set_up_worker(0)
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)

    worker = multiprocessing.get_context("fork").Process(target=helper)
    worker.start()
    worker.join(10)
    assert worker.exitcode == 0


SCRIPT = """
import os, signal, time
from pathlib import Path
from lora_dist.processes import preemption
from lora_dist.processes.runtime import launch
one = preemption.Preemption(launch("no"), Path("SAVE"))
preemption.SAME_REQUEST_SECONDS = 0.5
def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.2)
"""


def _run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT + script], capture_output=True, text=True, check=False)


def test_a_signal_while_nobody_listens_ends_the_process() -> None:
    """Before training there is nothing to save."""
    assert _run("send(signal.SIGTERM)").returncode == -signal.SIGTERM


def test_signals_at_once_are_one_request_and_a_later_one_ends_the_process_at_once() -> None:
    result = _run("""
with one.listening():
    send(signal.SIGINT)
    send(signal.SIGTERM)
    print("still here", flush=True)
    time.sleep(0.5)
    send(signal.SIGTERM)
    print("and now", flush=True)
""")
    assert result.returncode == 128 + signal.SIGTERM
    assert result.stdout == "still here\n"
    assert "second signal (SIGTERM): exiting without saving" in result.stderr
