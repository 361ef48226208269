"""Messages of the log beside a progress bar at a terminal."""

import io
import logging
import multiprocessing
import time
from typing import Any

import pytest
from lora_dist_testing.terminals import terminal
from tqdm import tqdm

from lora_dist.logs import AboveBars

ERASE = "\x1b[K"


def test_messages_stand_above_the_bar() -> None:
    """Warnings of any module, while the bar is shown and before it is."""
    with terminal() as (stderr, shown):
        logger = logging.Logger("lora_dist.any")
        logger.addHandler(AboveBars(stderr))
        bar = tqdm(total=3, delay=1e-3, mininterval=0, bar_format="{n_fmt}/{total_fmt}", file=stderr)
        logger.warning("before")
        time.sleep(2e-3)
        bar.update(2)
        logger.warning("first\nsecond")
        worker = multiprocessing.get_context("fork").Process(target=logger.warning, args=("of a worker",))
        worker.start()
        worker.join()
        bar.refresh()
        bar.close()
        print("the end", file=stderr)
        lines = [line.rstrip("\r").rpartition("\r")[2].removeprefix(ERASE) for line in shown("the end").split("\n")]
    assert lines[:6] == ["before", "first", "second", "of a worker", "2/3", "the end"]


def test_a_bar_that_is_drawn_at_once_gives_way_to_the_first_message() -> None:
    with terminal() as (stderr, shown):
        logger = logging.Logger("lora_dist.any")
        logger.addHandler(AboveBars(stderr))
        bar = tqdm(total=3, bar_format="{n_fmt}/{total_fmt}", file=stderr)
        logger.warning("first")
        bar.close()
        assert shown("first\r\n").partition("first")[0].endswith("0/3\r   \r")


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed later", "never open"])
def test_a_message_for_a_closed_stream_raises_nothing(is_closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of any handler of `logging`. Without standard error, as of pythonw, Python has None in its place."""
    stream: Any = io.StringIO() if is_closed else None
    monkeypatch.setattr("sys.stderr", None)
    logger = logging.Logger("lora_dist.any")
    logger.addHandler(AboveBars(stream))
    if is_closed:
        stream.close()
    logger.warning("unseen")
