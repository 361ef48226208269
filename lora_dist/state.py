"""A run's state in memory: its position, and the way of weights and moments into a checkpoint and back."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lora_dist import checkpoint
from lora_dist.checkpoint import Checkpoint
from lora_dist.errors import UserError
from lora_dist.model import trained_tensors


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
        loss_sum: sum of the losses of all updates.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    stale_evaluations: int = 0
    skipped_updates: int = 0
    train_seconds: float = 0.0
    samples: int = 0
    loss_sum: float = 0.0

    def note_evaluation(self, value: float, lower_is_better: bool) -> bool:
        """Takes a validation metric into account; True where it is the best so far."""
        better = self.best_value is None or (value < self.best_value if lower_is_better else value > self.best_value)
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

    def __init__(
        self,
        directory: Path,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        keep: int,
    ) -> None:
        """
        Args:
            directory: where the checkpoints stand.
            accelerator: of the launch.
            model: as prepared.
            optimizer: as prepared.
            identity: what a run has to share with this one to go on from it.
            keep: checkpoints to keep, besides the best.
        """
        self.directory = directory
        self._accelerator = accelerator
        self._model = accelerator.unwrap_model(model)
        self._optimizer = optimizer
        self._identity = identity
        self._keep = keep

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint of this moment and removes those that are no longer needed."""
        content = self._capture(progress)
        if self._accelerator.is_main_process:
            checkpoint.write(self.directory, progress.step, content)
            checkpoint.prune(self.directory, self._keep, progress.best_step)
        self._accelerator.wait_for_everyone()

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
        self._restore_trained(content.trained)
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in content.optimizer.items():
            moment, _, name = key.partition("/")
            moments.setdefault(name, {})[moment] = value
        for name, parameter in self._model.named_parameters():
            if name in moments:
                # AdamW keeps the count of steps on the host.
                self._optimizer.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device)
                    for moment, value in moments[name].items()
                }
        if self._accelerator.scaler is not None and content.state["scaler"]:
            self._accelerator.scaler.load_state_dict(content.state["scaler"])
        return Progress(**content.state["progress"])

    def restore_best(self, progress: Progress) -> None:
        """Puts the weights of the best checkpoint into the model."""
        if progress.best_step not in (None, progress.step):
            best = checkpoint.read(checkpoint.path_of(self.directory, progress.best_step))
            self._restore_trained(best.trained)

    def _capture(self, progress: Progress) -> Checkpoint:
        scaler = self._accelerator.scaler
        return Checkpoint(
            trained={name: _host(tensor) for name, tensor in trained_tensors(self._model)},
            optimizer={
                f"{moment}/{name}": _host(value)
                for name, parameter in self._model.named_parameters()
                for moment, value in self._optimizer.state.get(parameter, {}).items()
            },
            state={
                "progress": asdict(progress),
                "identity": self._identity,
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )

    def _restore_trained(self, trained: dict[str, Tensor]) -> None:
        targets = dict(trained_tensors(self._model))
        differing = sorted(trained.keys() ^ targets.keys())
        if differing:
            raise UserError(f"the checkpoint trains other tensors than this run: {', '.join(differing[:5])} …")
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(trained[name])


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
