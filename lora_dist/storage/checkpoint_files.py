"""The files of a checkpoint: their names, whether they are whole, and reading them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
COMPLETE = "COMPLETE"
AVERAGE = "average/"
"""Prefix of the averaged weights, which are kept beside the optimizer state."""


def find_damage(path: Path) -> str | None:
    """Returns the fault of a checkpoint; None if it has none."""
    try:
        manifest = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        for name in (TRAINED, OPTIMIZER, STATE):
            if not (path / name).is_file():
                return f"{name} is missing"
            if digest(path / name) != manifest[name]:
                return f"{name} is corrupt (its size or digest has changed)"
    except FileNotFoundError:
        return f"incomplete, because it has no file {COMPLETE}" if path.is_dir() else "no such directory"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE} is unreadable ({error})"
    return None


def read_optimizer(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads the optimizer state of a checkpoint, and the averaged weights; these are empty without --ema_decay."""
    optimizer = load_file(path / OPTIMIZER)
    averaged = [name for name in optimizer if name.startswith(AVERAGE)]
    return optimizer, {name.removeprefix(AVERAGE): optimizer.pop(name) for name in averaged}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the weights that were evaluated, and that become the result: the averaged ones, if there are any."""
    return read_optimizer(path)[1] or load_file(path / TRAINED)


def digest(path: Path) -> dict[str, Any]:
    """Returns the size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
