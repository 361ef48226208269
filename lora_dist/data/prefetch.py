"""Copies what the workers load to the device. On CUDA, the next item is copied while the current one is in use."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")


def on_device(found: Iterator[T], device: torch.device, moved: Callable[[T], T]) -> Iterator[T]:
    """Yields the items of an iterator, on `device`.

    On CUDA, the next item is copied on a stream of its own while the current one is in use. Elsewhere an item is taken
    and copied when it is requested.

    Args:
        found: items from workers, in page-locked memory if `device` is CUDA.
        device: to copy to.
        moved: starts the copy of an item's tensors to `device`.
    """
    if device.type != "cuda":
        yield from map(moved, found)
        return
    copies = torch.cuda.Stream(device)

    def copied(item: T) -> tuple[T, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return moved(item), copies.record_event()

    for item, event in one_ahead(found, copied):
        present = torch.cuda.current_stream(device)
        present.wait_event(event)
        for tensor in _tensors(item):
            # The allocator must not reuse its memory before the current stream is done with it.
            tensor.record_stream(present)
        yield item


def one_ahead(found: Iterator[T], started: Callable[[T], U]) -> Iterator[U]:
    """Yields `started(item)` of each item, after calling it for the next item as well.

    An error of the iterator is raised after all earlier items.
    """
    waiting: list[U] = []
    error: Exception | None = None
    while error is None:
        try:
            waiting.append(started(next(found)))
        except Exception as ahead:
            error = ahead
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
    if not isinstance(error, StopIteration):
        raise error


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested tuples."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, tuple):
        for part in item:
            yield from _tensors(part)
