"""Changes to files of models, in place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_json(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of a safetensors file by a function that changes a dict of them."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
