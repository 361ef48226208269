"""Checkpoints on disk: written atomically, verified when read, limited in number.

A checkpoint is a directory `step-00000120` with the trained tensors, the optimizer state and the progress, in
safetensors and JSON: loading it executes no code. `COMPLETE`, written last, holds the size and digest of each file.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_dist.errors import UserError
from lora_dist.storage.atomic import remove_directory, remove_leftovers, unused, whole_directory
from lora_dist.storage.checkpoint_files import (
    AVERAGE,
    COMPLETE,
    OPTIMIZER,
    STATE,
    TRAINED,
    digest,
    find_damage,
    read_optimizer,
)

logger = logging.getLogger(__name__)

_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        trained: all tensors that training changes, by name.
        optimizer: optimizer state, by `<moment>/<parameter>`.
        state: progress, identity, loss scale and versions, as JSON values.
        directory: where it was read from.
        average: moving average of `trained`; empty without --ema_decay.
    """

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    directory: Path | None = None
    average: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that were evaluated, and that become the result."""
        return self.average or self.trained


def path_of(root: Path, step: int) -> Path:
    """Returns the path of the checkpoint after `step` updates."""
    return root / f"{_PREFIX}{step:08d}"


def write(root: Path, step: int, content: Checkpoint) -> Path:
    """Writes a checkpoint and returns its path."""
    final = path_of(root, step)
    with whole_directory(final) as aside:
        save_file(content.trained, aside / TRAINED)
        average = {f"{AVERAGE}{name}": tensor for name, tensor in content.average.items()}
        save_file({**content.optimizer, **average}, aside / OPTIMIZER)
        _write_state(aside, content.state, {name: digest(aside / name) for name in (TRAINED, OPTIMIZER)})
    return final


def replace_state(root: Path, step: int, state: dict[str, Any]) -> None:
    """Rewrites the state of a checkpoint. Tensor files are hard-linked, or copied if that is not supported.

    Raises:
        OSError: the checkpoint is missing or cannot be written; an existing one is unchanged.
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
        UserError: the directory is not a checkpoint, or the checkpoint is incomplete or damaged.
    """
    problem = find_damage(path)
    if problem:
        raise UserError(f"cannot resume from {path}: {problem}")
    optimizer, average = read_optimizer(path)
    return Checkpoint(
        trained=load_file(path / TRAINED),
        optimizer=optimizer,
        state=json.loads((path / STATE).read_text(encoding="utf-8")),
        directory=path,
        average=average,
    )


def read_newest(root: Path) -> tuple[Path, Checkpoint] | None:
    """Returns the newest complete checkpoint, or None. Logs and skips damaged ones."""
    for path in reversed(listed(root)):
        try:
            return path, read(path)
        except (UserError, OSError, SafetensorError, ValueError) as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    return None


def listed(root: Path) -> list[Path]:
    """Returns all checkpoints below `root`, oldest first, complete or not."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def listed_after(root: Path, step: int) -> list[Path]:
    """Returns the checkpoints below `root` with more than `step` updates."""
    return [path for path in listed(root) if path > path_of(root, step)]


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Deletes all but the newest `keep` complete checkpoints and the best one, and leftovers of killed runs."""
    best = path_of(root, best_step) if best_step is not None else None
    whole = [path for path in listed(root) if _was_finished(path)]
    for path in listed(root):
        if path not in (*whole[-keep:], best):
            remove_directory(path)
    remove_leftovers(root)


def _was_finished(path: Path) -> bool:
    """Whether all files have the size in the manifest. Does not check digests, which would read every file."""
    try:
        manifest = json.loads((path / COMPLETE).read_text(encoding="utf-8"))
        return all((path / name).stat().st_size == manifest[name]["bytes"] for name in (TRAINED, OPTIMIZER, STATE))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def abandon_after(root: Path, step: int) -> None:
    """Renames checkpoints after update `step` to `abandoned-…` when a run resumes from that update."""
    for path in listed_after(root, step):
        logger.warning("%s is from after update %d, from which this run resumes: renamed to abandoned-…", path, step)
        path.rename(unused(path.with_name(f"abandoned-{path.name}")))


def _write_state(directory: Path, state: dict[str, Any], digests: dict[str, Any]) -> None:
    """Writes the state, and then the manifest that makes the checkpoint complete."""
    (directory / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    manifest = {**digests, STATE: digest(directory / STATE)}
    (directory / COMPLETE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Hard-links a file, or copies it if the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
