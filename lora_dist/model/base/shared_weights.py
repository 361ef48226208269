"""Writes a model whose modules share weights, such as CoaT of timm."""

from pathlib import Path
from typing import Any

from torch import Tensor


def save_model(model: Any, directory: Path) -> None:
    """Writes a `transformers` model, with a copy of the weights for each name that they have.

    `save_pretrained` alone refuses weights with several names, unless their class declares them as tied.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        state[name] = tensor.detach().clone() if id(tensor) in seen else tensor.detach()
        seen.add(id(tensor))
    model.save_pretrained(directory, state_dict=state)
