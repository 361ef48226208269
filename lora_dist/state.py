"""A run's state in memory: its position, and the way of weights and moments into a checkpoint and back."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

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


def capture(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: dict[str, Any],
) -> Checkpoint:
    """A checkpoint of this moment. Called on every process.

    Args:
        accelerator: of the launch.
        model: as prepared.
        optimizer: as prepared.
        progress: of the run.
        identity: what a run has to share with this one to go on from it.
    """
    bare = accelerator.unwrap_model(model)
    trained = {name: _host(tensor) for name, tensor in trained_tensors(bare)}
    moments = {
        f"{moment}/{name}": _host(value)
        for name, parameter in bare.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    return Checkpoint(trained, moments, {"progress": asdict(progress), "identity": identity, "scaler": scaler})


def restore(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> Progress:
    """Puts a checkpoint back, exactly. Called on every process.

    Raises:
        UserError: the checkpoint is of a run that differs in a way that would change the result.
    """
    saved = checkpoint.state["identity"]
    differing = [name for name in identity if saved.get(name) != identity[name]]
    if differing:
        changes = (f"{name} was {saved.get(name)} and is now {identity[name]}" for name in differing)
        raise UserError(
            "\n  ".join(["the checkpoint is of another run:", *changes])
            + "\nUse the settings of that run (its config.yaml), or another --output_dir."
        )
    restore_trained(checkpoint.trained, accelerator, model)
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        moments = {
            key.partition("/")[0]: value.to("cpu" if key.startswith("step/") else parameter.device)
            for key, value in checkpoint.optimizer.items()
            if key.partition("/")[2] == name
        }
        if moments:
            optimizer.state[parameter] = moments
    if accelerator.scaler is not None and checkpoint.state["scaler"]:
        accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    return Progress(**checkpoint.state["progress"])


def restore_trained(trained: dict[str, Tensor], accelerator: Accelerator, model: nn.Module) -> None:
    """Puts the weights of a checkpoint back.

    Raises:
        UserError: names of tensors that the checkpoint or the model lacks.
    """
    targets = dict(trained_tensors(accelerator.unwrap_model(model)))
    differing = _symmetric_difference(trained, targets)
    if differing:
        raise UserError(f"the checkpoint trains other tensors than this run: {', '.join(differing[:5])}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(trained[name])


def _symmetric_difference(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return sorted(set(first) ^ set(second))


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
