"""A wait is said once it is long, again now and then, and no longer than it lasts."""

import logging
import re
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lora_dist import waiting
from lora_dist.processes.agreement import _appears


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits count as long after a tenth of a second."""
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "AGAIN_SECONDS", 0.2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_a_long_wait_is_said_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    states = iter(["waiting for rank 1, 2", None, "waiting for rank 2"])
    with waiting.log_wait(lambda: next(states)):
        while len(caplog.messages) < 2:
            time.sleep(0.01)
    assert re.sub(r"\d", "N", caplog.messages[1]) == "waiting for rank N (N s so far)"
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        "waiting for rank 1, 2",
        "waiting for rank 2",
    ]
    time.sleep(0.3)
    assert len(caplog.messages) == 2


def test_a_short_wait_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with waiting.log_wait("waiting"):
        pass
    time.sleep(0.2)
    assert not caplog.messages


@pytest.mark.parametrize(("local_rank", "logs", "count"), [("1", None, 0), ("1", True, 1), ("0", None, 1)])
def test_one_process_of_a_node_speaks_unless_another_has_to(
    local_rank: str, logs: bool | None, count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with waiting.log_wait("waiting", logs):
        time.sleep(0.2)
    assert len(caplog.messages) == count


def test_every_process_is_heard_even_where_the_logs_are_those_of_the_first_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As `set_up_logs` leaves a process that is not the first."""
    package = logging.getLogger("lora_dist")
    before = package.level
    package.setLevel(logging.ERROR)
    try:
        with waiting.log_wait("waiting"):
            time.sleep(0.2)
    finally:
        package.setLevel(before)
    assert len(caplog.messages) == 1


def test_a_lock_that_another_process_has_is_waited_for_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "lock"):
            held.set()
            time.sleep(0.25)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(5)
    with waiting.locked(tmp_path / "lock", "builds the cache"):
        other.join(0.1)
        assert not other.is_alive()
    holds = f"which builds the cache and holds the lock {tmp_path / 'lock'}"
    said = f"waiting for another process, {holds}; giving up after 6 h ("
    assert said in caplog.text
    with waiting.locked(tmp_path / "lock", "builds the cache"):
        pass


def test_a_file_that_is_not_seen_yet_is_waited_for_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As where the nodes share a slow file system, or none."""
    threading.Timer(0.25, (tmp_path / "token").touch).start()
    assert _appears(tmp_path / "token", seconds=30)
    said = f"waiting for a file of rank 0 to appear in {tmp_path}; giving up after 30 s ("
    assert said in caplog.text
    assert not _appears(tmp_path / "none", seconds=0.1)
