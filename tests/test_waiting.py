"""A wait is said once it is long, again now and then, and no longer than it lasts."""

import logging
import time

import pytest

from lora_dist import waiting


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits count as long after a tenth of a second."""
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "AGAIN_SECONDS", 0.2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_a_long_wait_is_said_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    states = iter(["waiting for rank 1, 2", None, "waiting for rank 2"])
    with waiting.told(lambda: next(states)):
        while len(caplog.messages) < 2:
            time.sleep(0.01)
    assert caplog.messages == ["waiting for rank 1, 2 (0 s so far)", "waiting for rank 2 (1 s so far)"]
    time.sleep(0.3)
    assert len(caplog.messages) == 2


def test_a_short_wait_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with waiting.told("waiting"):
        pass
    time.sleep(0.2)
    assert not caplog.messages


@pytest.mark.parametrize(("local_rank", "speaks", "count"), [("1", None, 0), ("1", True, 1), ("0", None, 1)])
def test_one_process_of_a_node_speaks_unless_another_has_to(
    local_rank: str, speaks: bool | None, count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with waiting.told("waiting", speaks):
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
        with waiting.told("waiting"):
            time.sleep(0.2)
    finally:
        package.setLevel(before)
    assert caplog.messages == ["waiting (0 s so far)"]
