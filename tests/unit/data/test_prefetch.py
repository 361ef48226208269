"""Items one ahead, and errors in their turn. Copies beside the computation need a GPU."""

from collections.abc import Iterator

import pytest
import torch

from lora_dist.data.prefetch import on_device, one_ahead


def _numbers(count: int, log: list[str], error: Exception | None = None) -> Iterator[int]:
    try:
        for number in range(count):
            log.append(f"load {number}")
            yield number
        if error is not None:
            raise error
    finally:
        log.append("closed")


def test_the_next_item_is_started_before_the_present_one_is_handed_over() -> None:
    log: list[str] = []
    ahead = one_ahead(_numbers(3, log), lambda number: log.append(f"start {number}") or number * 10)
    for number in ahead:
        log.append(f"use {number}")
    starts = ["load 0", "start 0", "load 1", "start 1", "use 0", "load 2", "start 2", "use 10", "closed", "use 20"]
    assert log == starts


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_error_comes_after_the_items_before_it(count: int) -> None:
    seen: list[int] = []
    with pytest.raises(OSError, match="lost"):
        seen.extend(one_ahead(_numbers(count, [], OSError("lost")), int))
    assert seen == list(range(count))


def test_nothing_is_taken_ahead_on_a_cpu_and_closing_reaches_the_loader() -> None:
    log: list[str] = []
    found = on_device(_numbers(3, log), torch.device("cpu"), lambda number: number + 1)
    assert next(found) == 1
    assert log == ["load 0"]
    found.close()  # type: ignore[attr-defined]
    del found
    assert log == ["load 0", "closed"]
