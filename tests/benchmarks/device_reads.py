"""Counts reads of tensors by the host, each of which would wait for a GPU: `item`, `float`, `bool`, `tolist` …

Runs on a CPU as well, where reading waits for nothing. AdamW's own count of steps is left out: it is on the host.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING_OPERATORS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
)
READING_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class Reads:
    """A context that counts reads. Within a counted method, its operators do not count again.

    Attributes:
        where: file and line of each read.
    """

    def __init__(self) -> None:
        self.where: list[str] = []
        self._modes = (_Operators(self.where), _Methods(self.where))

    def __enter__(self) -> "Reads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, where: list[str]) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        reads = func in READING_OPERATORS or (func == torch.ops.aten.index.Tensor and _has_mask(args[1]))
        if reads and not (place := _place()).startswith("torch/optim/"):
            self._where.append(place)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, where: list[str]) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self._where.append(_place())
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Iterable[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _place() -> str:
    """File, from the package's folder on, and line of the code that reads."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename == __file__ or "/torch/_" in frame.f_code.co_filename):
        frame = frame.f_back
    name = frame.f_code.co_filename.partition("site-packages/")[2] or frame.f_code.co_filename
    return f"{name}:{frame.f_lineno}"
