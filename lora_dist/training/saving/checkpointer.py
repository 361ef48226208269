"""Saves and restores the state of a run: weights, optimizer state and progress."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

from lora_dist.engines.engine import Engine, broadcast_statistics
from lora_dist.errors import UserError
from lora_dist.model.lora.parameter_names import lora_layer_of
from lora_dist.model.lora.trainable import trained_tensors
from lora_dist.processes.runtime import versions
from lora_dist.training.identity import differences
from lora_dist.training.progress import Progress
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.checkpoint import Checkpoint
from lora_dist.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)

KEPT_IN_MEMORY = 2**28
"""Maximum bytes of the best weights to keep in memory in case the disk fails; enough for LoRA, not for every `full`."""


class Checkpointer:
    """Saves and restores the state of a run. Every method must be called on every process.

    Attributes:
        directory: where the checkpoints stand.
        saved_step: update of the last checkpoint that was written or restored.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        identity: dict[str, Any],
        keep: int,
        writing: Callable[[], AbstractContextManager[object]] = nullcontext,
        average: WeightAverage | None = None,
    ) -> None:
        """
        Args:
            directory: where the checkpoints stand.
            engine: engine whose state is saved.
            identity: facts that a run must share with this one to resume from its checkpoints.
            keep: checkpoints to keep, besides the best.
            writing: context in which the main process writes; see `Watch.writing`.
            average: averaged weights, which are saved as well and become the result.
        """
        self.directory = directory
        self._engine = engine
        self._identity = identity
        self._keep = keep
        self._writing = writing
        self._average = average
        self.saved_step: int | None = None
        self._written_step: int | None = None
        self._best_weights: tuple[int, dict[str, Tensor]] | None = None
        self._last_weights: dict[str, Tensor] | None = None

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint of the current state and deletes old ones.

        Logs write errors and lets training continue, because the next write may succeed. The best weights are also kept
        in memory; large ones only if they could not be written.
        """
        if not self._replace_state(progress):
            self._save_all(progress)
        if progress.best_step == progress.step:
            self._best_weights = None if self._last_weights is None else (progress.step, self._last_weights)

    def _replace_state(self, progress: Progress) -> bool:
        """Rewrites the state of a checkpoint already written for this update, whose tensors are unchanged."""
        if self._written_step != progress.step:
            return False
        replaced = False
        if self._engine.accelerator.is_main_process:
            try:
                with self._writing():
                    checkpoint.replace_state(self.directory, progress.step, self._state(progress))
                    checkpoint.prune(self.directory, self._keep, progress.best_step)
                replaced = True
            except (OSError, ValueError, KeyError) as error:
                logger.warning("cannot reuse the checkpoint of update %d, rewriting it: %s", progress.step, error)
        (replaced,) = broadcast_object_list([replaced])
        return replaced

    def _save_all(self, progress: Progress) -> None:
        content = Checkpoint(
            trained=self._engine.trainable_state(),
            optimizer=self._engine.optimizer_state(),
            state=self._state(progress),
            average={} if self._average is None else self._average.state(),
        )
        # The first process decides for all: the statistics of batch norms differ by process.
        (saved,) = broadcast_object_list([self._engine.accelerator.is_main_process and self._write(progress, content)])
        if saved:
            self.saved_step = self._written_step = progress.step
        self._last_weights = content.weights if not saved or _small(content.weights) else None

    def _state(self, progress: Progress) -> dict[str, Any]:
        return {
            "progress": asdict(progress),
            "identity": self._identity,
            "scaler": self._engine.scaler_state(),
            "versions": versions(),
            "mixed_precision": self._engine.accelerator.mixed_precision,
        }

    def _write(self, progress: Progress, content: Checkpoint) -> bool:
        broken = [name for name, tensor in content.trained.items() if not tensor.isfinite().all()]
        if broken:
            logger.warning("checkpoint not saved, because %s is not finite; the previous one is kept", broken[0])
            return False
        try:
            with self._writing():
                checkpoint.write(self.directory, progress.step, content)
                checkpoint.prune(self.directory, self._keep, progress.best_step)
        except (OSError, SafetensorError) as error:
            logger.error(
                "cannot write the checkpoint of update %d: %s. Training continues. Free space for the next one; until "
                "then, the last checkpoint to resume from: %s.",
                progress.step,
                error,
                "none" if self.saved_step is None else f"update {self.saved_step}",
            )
            return False
        logger.info("saved a checkpoint after update %d", progress.step)
        return True

    def restore(self, content: Checkpoint) -> Progress:
        """Restores weights, optimizer state, loss scale and progress from a checkpoint.

        Raises:
            UserError: the checkpoint is from a run that differs in a way that would change the result.
        """
        if changes := list(differences(content.state["identity"], self._identity)):
            raise UserError(
                "\n  ".join(["the checkpoint does not match this run:", *changes])
                + "\nUse the settings, base and data of that run (see its config.yaml), or another --output_dir."
            )
        _tell_other_versions(content.state.get("versions", {}))
        _tell_other_precision(content.state.get("mixed_precision"), self._engine.accelerator.mixed_precision)
        # A parameter that ZeRO-3 has sharded keeps its shape in `ds_shape`.
        expected = {
            name: tuple(getattr(tensor, "ds_shape", tensor.shape))
            for name, tensor in trained_tensors(self._engine.unwrapped)
        }
        found = {name: tuple(tensor.shape) for name, tensor in content.trained.items()}
        unmatched = sorted({name for name, _ in expected.items() ^ found.items()})
        if unmatched:
            layers = {(lora_layer_of(name) or "").rpartition(".")[2] for name in found.keys() - expected.keys()} - {""}
            lines = [f"the trained tensors of the checkpoint have other names or shapes: {', '.join(unmatched[:5])} …"]
            if layers:
                lines.append(f"The checkpoint has LoRA on --lora_target_modules {','.join(sorted(layers))}")
            raise UserError("\n".join(lines))
        if self._average is not None:
            if not content.average:
                raise UserError("the checkpoint has no averaged weights: remove --ema_decay, or start a new run")
            self._average.load_state(content.average)
        self._engine.load_trainable_state(content.trained)
        self._engine.load_optimizer_state(content.optimizer)
        self._engine.load_scaler_state(content.state["scaler"])
        progress = Progress.of(content.state["progress"])
        # A checkpoint from another directory is saved into this one when the run continues.
        mine = checkpoint.path_of(self.directory, progress.step).is_dir()
        (mine,) = broadcast_object_list([mine])
        self.saved_step = progress.step if mine else None
        # The first process decides for all, as in `save`, because all processes have to save together.
        (gone,) = broadcast_object_list(
            [progress.best_step is not None and checkpoint.find_damage(self._best(progress))]
        )
        if gone:
            logger.warning("the best checkpoint (update %d) is missing; selecting a new best", progress.best_step)
            progress.forget_best()
        elif progress.best_step is not None and _small(content.trained):
            self._best_weights = progress.best_step, checkpoint.read(self._best(progress)).weights
        return progress

    def restore_best(self, progress: Progress) -> None:
        """Loads the best weights into the model. If they are lost, loads the last ones and sets `best_step` to None."""
        weights = None
        if progress.best_step not in (None, progress.step):
            weights = self.best_weights(progress)
            if weights is None:
                logger.warning("the result has the last weights instead of the best ones")
        if weights is None and self._average is not None:
            weights = self._average.state()
        if weights is not None:
            self._engine.load_trainable_state(weights)
            broadcast_statistics(self._engine)

    def best_weights(self, progress: Progress) -> dict[str, Tensor] | None:
        """Returns the weights of the best update. If they are lost, returns None and sets `best_step` to None."""
        if self._best_weights is not None and self._best_weights[0] == progress.best_step:
            return self._best_weights[1]
        best = self._best(progress)
        (damage,) = broadcast_object_list([self._engine.accelerator.is_main_process and checkpoint.find_damage(best)])
        if not damage:
            return checkpoint.read(best).weights
        logger.warning("the best weights (update %d) cannot be read any more (%s)", progress.best_step, damage)
        progress.forget_best()
        return None

    def _best(self, progress: Progress) -> Path:
        assert progress.best_step is not None
        return checkpoint.path_of(self.directory, progress.best_step)


def _small(trained: dict[str, Tensor]) -> bool:
    """Whether a copy of the weights is small enough to keep in memory."""
    return sum(tensor.nbytes for tensor in trained.values()) <= KEPT_IN_MEMORY


def _tell_other_versions(before: dict[str, str]) -> None:
    """Logs packages whose versions differ from those that wrote the checkpoint."""
    now = versions()
    changed = [name for name, version in before.items() if now.get(name) != version]
    if changed:
        logger.warning(
            "the checkpoint was written with %s, but this run uses %s: results may differ from an uninterrupted run",
            ", ".join(f"{name} {before[name]}" for name in changed),
            ", ".join(f"{name} {now.get(name)}" for name in changed),
        )


def _tell_other_precision(before: str | None, now: str) -> None:
    """Logs that the precision has changed, which may come from the launch file; older checkpoints do not record it."""
    if before not in (None, now):
        logger.warning("the checkpoint was trained with --mixed_precision %s, and this run uses %s", before, now)
