"""Converts durations to updates, computes the learning rate, and says when a periodic action is due."""

import math
from dataclasses import dataclass
from typing import Literal

from lora_dist.settings.train import OptimizationSettings


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run of `total_steps` updates.

    Attributes:
        peak: learning rate at the end of the warm-up.
        kind: how it falls from there to `floor` (`constant` does not).
        warmup_steps: updates over which it rises linearly from 0.
        total_steps: updates in the whole run.
        floor: learning rate at the end.
    """

    peak: float
    kind: Literal["linear", "cosine", "constant"]
    warmup_steps: int
    total_steps: int
    floor: float = 0.0

    @classmethod
    def of(cls, settings: OptimizationSettings, steps_per_epoch: int) -> "Schedule":
        """Returns the schedule of the settings, with `steps_per_epoch` updates in an epoch."""
        total = total_steps(settings.num_train_epochs, settings.max_train_steps, steps_per_epoch)
        warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
        return cls(settings.learning_rate, settings.lr_scheduler_type, warmup, total, settings.min_lr)

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of update `step` (from 0), equal to that of `transformers.get_scheduler`.

        That of a cosine with a floor is `cosine_with_min_lr`.
        """
        if step < self.warmup_steps:
            return self.peak * step / max(1, self.warmup_steps)
        if self.kind == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        share = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.floor + (self.peak - self.floor) * max(0.0, share)


def total_steps(num_epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Updates in a run: `max_steps` if given, else epochs (fractions count) times updates per epoch."""
    return max_steps if max_steps is not None else math.ceil(num_epochs * steps_per_epoch)


def is_due(every: int | Literal["epoch", "no"], step: int, steps_per_epoch: int, total: int) -> bool:
    """Whether an action is due after `step` updates. What happens at all also happens after the last one."""
    if every == "no":
        return False
    return step == total or step % (steps_per_epoch if every == "epoch" else every) == 0
