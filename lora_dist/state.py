"""A run's state in memory: its position, and the way of weights and moments into a checkpoint and back."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_dist import checkpoint
from lora_dist.checkpoint import Checkpoint
from lora_dist.engine import Engine
from lora_dist.errors import UserError
from lora_dist.model import trained_tensors

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands.

    There is no random state here: order, augmentation and dropout are functions of the seed and the position.

    Attributes:
        step: updates done.
        best_step: update with the best validation metric so far.
        best_value: that metric.
        stale_evaluations: evaluations since then.
        skipped_updates: updates that fp16 loss scaling left out.
        train_seconds: time spent in updates, evaluation and saving not counted.
        samples: samples trained on in that time.
        grad_norm: of the last update, before clipping.
        loss_sum: sum of the losses of all updates.
        logged_step: update of the last log.
        logged_loss_sum: `loss_sum` then.
        settled_step: last update after which the evaluation that was due has been made; a run that was stopped before
            it makes it when it goes on.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stale_evaluations: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0
    samples: int = 0
    grad_norm: float = 0.0
    loss_sum: float = 0.0
    logged_step: int = 0
    logged_loss_sum: float = 0.0
    settled_step: int = 0

    def note_evaluation(self, value: float, lower_is_better: bool) -> bool:
        """Takes a validation metric into account; True where it is the best so far."""
        before = self.best_value
        # A metric that is not a number is better than none, and worse than any.
        better = before is None or math.isnan(before) or (value < before if lower_is_better else value > before)
        if better:
            self.best_step, self.best_value, self.stale_evaluations = self.step, value, 0
        else:
            self.stale_evaluations += 1
        return better


class Checkpointer:
    """Saves a run's state and puts it back. Every method is called on every process.

    Attributes:
        directory: where the checkpoints stand.
    """

    def __init__(self, directory: Path, engine: Engine, identity: dict[str, Any], keep: int) -> None:
        """
        Args:
            directory: where the checkpoints stand.
            engine: whose state it is.
            identity: what a run has to share with this one to go on from it.
            keep: checkpoints to keep, besides the best.
        """
        self.directory = directory
        self._engine = engine
        self._identity = identity
        self._keep = keep

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint of this moment and removes those that are no longer needed."""
        content = Checkpoint(
            trained=self._engine.trained(),
            optimizer=self._engine.moments(),
            state={
                "progress": asdict(progress),
                "identity": self._identity,
                "scaler": self._engine.scaler_state(),
            },
        )
        broken = [name for name, tensor in content.trained.items() if not tensor.isfinite().all()]
        if broken:
            logger.warning("not saved, because %s is not finite: the checkpoint before stands", broken[0])
        elif self._engine.accelerator.is_main_process:
            checkpoint.write(self.directory, progress.step, content)
            checkpoint.prune(self.directory, self._keep, progress.best_step)
        self._engine.accelerator.wait_for_everyone()

    def restore(self, content: Checkpoint) -> Progress:
        """Puts a checkpoint back, exactly.

        Raises:
            UserError: it is of a run that differs in a way that would change the result.
        """
        saved = content.state["identity"]
        differing = [name for name in self._identity if saved.get(name) != self._identity[name]]
        if differing:
            changes = (f"{name} was {saved.get(name)} and is now {self._identity[name]}" for name in differing)
            raise UserError(
                "\n  ".join(["the checkpoint is of another run:", *changes])
                + "\nUse the settings of that run (its config.yaml), or another --output_dir."
            )
        # A parameter that ZeRO-3 has sharded keeps its shape in `ds_shape`.
        expected = {
            name: tuple(getattr(tensor, "ds_shape", tensor.shape))
            for name, tensor in trained_tensors(self._engine.bare)
        }
        found = {name: tuple(tensor.shape) for name, tensor in content.trained.items()}
        unmatched = sorted({name for name, _ in expected.items() ^ found.items()})
        if unmatched:
            raise UserError(
                f"the checkpoint trains other tensors than this run, or of other shapes: {', '.join(unmatched[:5])} …"
            )
        self._engine.load_trained(content.trained)
        self._engine.load_moments(content.optimizer)
        self._engine.load_scaler_state(content.state["scaler"])
        progress = Progress(**content.state["progress"])
        if self._engine.accelerator.is_main_process:
            checkpoint.abandon_after(self.directory, progress.step)
        self._engine.accelerator.wait_for_everyone()
        if progress.best_step is not None and checkpoint.find_damage(self._best(progress)):
            logger.warning("the best checkpoint so far, of update %d, is not here; looking anew", progress.best_step)
            progress.best_step = progress.best_value = None
        return progress

    def restore_best(self, progress: Progress) -> None:
        """Puts the weights of the best checkpoint into the model."""
        if progress.best_step not in (None, progress.step):
            self._engine.load_trained(checkpoint.read(self._best(progress)).trained)

    def _best(self, progress: Progress) -> Path:
        assert progress.best_step is not None
        return checkpoint.path_of(self.directory, progress.best_step)
