"""What is logged while a progress bar stands at a terminal."""

import fcntl
import logging
import os
import pty
import struct
import sys
import termios
import time

import pytest
from tqdm import tqdm

from lora_dist.logs import AboveBars


def test_messages_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings of any module, while the bar is shown and before it is."""
    reading, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(terminal, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        logger = logging.Logger("lora_dist.any")
        logger.addHandler(AboveBars(stderr))
        bar = tqdm(total=3, delay=1e-3, mininterval=0, bar_format="{n_fmt}/{total_fmt}", file=stderr)
        logger.warning("before")
        time.sleep(2e-3)
        bar.update(2)
        logger.warning("first\nsecond")
        bar.close()
        print("the end", file=stderr)
        shown = b""
        while b"the end" not in shown:
            shown += os.read(reading, 10_000)
    os.close(reading)
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in shown.decode().split("\n")]
    assert lines[:5] == ["before", "first", "second", "2/3", "the end"]
