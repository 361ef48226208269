"""How far a prediction is: a bar on a terminal, and a line from time to time without one."""

import io
import logging
import sys

import pytest

from lora_dist.deployment import progress
from lora_dist.deployment.progress import Progress


def test_a_log_says_how_far_it_is_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 10.0, 70.0, 80.0, 140.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), Progress(1000, done=100) as shown:
        for done in (110, 240, 250, 520):
            shown.advance_to(done)
    # Rows of an earlier run count for what is done, and not for the speed.
    assert [record.message for record in caplog.records] == [
        "240 of 1000 images, 2.0 images/s, 06:20 left",
        "520 of 1000 images, 3.0 images/s, 02:40 left",
    ]


def test_silence_is_kept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with caplog.at_level(logging.INFO), Progress(10, silent=True) as shown:
        shown.advance_to(5)
    assert not caplog.records


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO), Progress(1000, done=100) as shown:
        shown.advance_to(1000)
    assert "1000/1000" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()
    assert not caplog.records
