"""Checkpoints on disk: written aside, flushed, renamed and marked complete; verified when read; kept to a number.

A checkpoint is a directory `step-00000120` with what trains, the optimizer's moments and the run's position, in
safetensors and JSON: reading one runs no code. `COMPLETE`, written last, holds the size and digest of each file.
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.errors import UserError
from lora_dist.storage.files import remove_directory, remove_leftovers, unused, whole_directory

logger = logging.getLogger(__name__)

TRAINED = "trained.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
COMPLETE = "COMPLETE"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        trained: name to tensor of all that training changes.
        optimizer: `<moment>/<parameter>` to tensor.
        state: position and counters, as JSON holds them.
        directory: where it was read from.
    """

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    directory: Path | None = None


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates stands."""
    return root / f"{_PREFIX}{step:08d}"


def write(root: Path, step: int, content: Checkpoint) -> Path:
    """Writes a checkpoint and returns where."""
    final = path_of(root, step)
    with whole_directory(final) as aside:
        save_file(content.trained, aside / TRAINED)
        save_file(content.optimizer, aside / OPTIMIZER)
        _write_state(aside, content.state, {name: _digest(aside / name) for name in (TRAINED, OPTIMIZER)})
    return final


def replace_state(root: Path, step: int, state: dict[str, Any]) -> None:
    """Writes a checkpoint again with another state. Its tensors are linked, not copied, where the disk can do that.

    Raises:
        OSError: it is not there, or cannot be written; the one that is there stays.
        ValueError: its manifest is damaged.
    """
    final = path_of(root, step)
    manifest = json.loads((final / COMPLETE).read_text(encoding="utf-8"))
    with whole_directory(final) as aside:
        for name in (TRAINED, OPTIMIZER):
            _link(final / name, aside / name)
        _write_state(aside, state, {name: manifest[name] for name in (TRAINED, OPTIMIZER)})


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint after verifying every file of it.

    Raises:
        UserError: the directory is no checkpoint, or an incomplete or damaged one.
    """
    problem = find_damage(path)
    if problem:
        raise UserError(f"cannot resume from {path}: {problem}")
    return Checkpoint(
        trained=load_file(path / TRAINED),
        optimizer=load_file(path / OPTIMIZER),
        state=json.loads((path / STATE).read_text(encoding="utf-8")),
        directory=path,
    )


def read_newest(root: Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that is whole, passing over damaged ones and saying so; None where there is none."""
    for path in reversed(listed(root)):
        try:
            return path, read(path)
        except (UserError, OSError, SafetensorError, ValueError) as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    return None


def listed(root: Path) -> list[Path]:
    """Checkpoints below `root`, oldest first, whole or not."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def listed_after(root: Path, step: int) -> list[Path]:
    """Those of them that are of more than `step` updates."""
    return [path for path in listed(root) if path > path_of(root, step)]


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        for name in (TRAINED, OPTIMIZER, STATE):
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != manifest[name]:
                return f"{name} differs from what was written"
    except FileNotFoundError:
        return f"no {COMPLETE} in it, so it was never finished" if path.is_dir() else "no such directory"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE} is unreadable ({error})"
    return None


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` whole checkpoints and the best, and what killed runs left half done."""
    best = path_of(root, best_step) if best_step is not None else None
    whole = [path for path in listed(root) if _was_finished(path)]
    for path in listed(root):
        if path not in (*whole[-keep:], best):
            remove_directory(path)
    remove_leftovers(root)


def _was_finished(path: Path) -> bool:
    """Whether the files of a checkpoint have their sizes; a save need not read all that was saved before."""
    try:
        manifest = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == manifest[name]["bytes"] for name in (TRAINED, OPTIMIZER, STATE))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def abandon_after(root: Path, step: int) -> None:
    """Puts aside the checkpoints after `step` updates, when a run goes on from there on another course."""
    for path in listed_after(root, step):
        logger.warning("%s is of another course than the one that goes on from update %d: put aside", path, step)
        path.rename(unused(path.with_name(f"abandoned-{path.name}")))


def _write_state(directory: Path, state: dict[str, Any], digests: dict[str, Any]) -> None:
    """Writes the state, and then the manifest that makes the checkpoint complete."""
    (directory / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    manifest = {**digests, STATE: _digest(directory / STATE)}
    (directory / COMPLETE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
