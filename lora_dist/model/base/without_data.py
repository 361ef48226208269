"""Runs a model without weights and images, to see the shapes of its outputs."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch


def outputs_without_data(make: Callable[[Any], Any], config: Any, size: tuple[int, int]) -> Any:
    """Returns the outputs of the model that `make` builds from `config` for one image [1, 3, *size], as meta tensors.

    Raises:
        Exception: of any class; each model has its own for inputs that it does not take.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            return make(config).eval()(pixel_values=torch.empty(1, 3, *size))
    finally:
        # Some models cache tables of positions by their size alone, and would find meta tensors later.
        for found in gc.get_objects():
            if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("transformers."):
                found.cache_clear()
