"""The adapters in `old_releases/`, made by old releases, and the logits that they gave there."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OLD = Path(__file__).parents[2] / "old_releases"


def pixels(size: int = 16) -> Tensor:
    """The images [2, 3, size, size] of `old_releases/old.py`."""
    return torch.linspace(0, 60, 2 * 3 * size * size, dtype=torch.float64).sin().float().view(2, 3, size, size)


@torch.inference_mode()
def logits(model: Any, size: int = 16) -> Tensor:
    """What a model says of them."""
    return model.eval()(pixel_values=pixels(size)).logits


def expected_of(directory: Path, key: str = "logits") -> Tensor:
    """What the old release said of them."""
    return torch.tensor(json.loads((directory / "expected.json").read_text())[key])
