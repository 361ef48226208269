"""The progress of a run: counters that a checkpoint keeps."""

import math
from dataclasses import dataclass
from typing import Any

from lora_dist.training.step import Update

_FORMER_NAMES = {
    "blind_updates": "consecutive_unreadable",
    "settled_step": "last_evaluated_step",
    "skipped_in_a_row": "consecutive_skipped",
    "nonfinite_in_a_row": "consecutive_nonfinite",
}


@dataclass
class Progress:
    """Progress counters of a run.

    A run resumes after update `step`. The epoch and the samples follow from it (`BatchPlan`), and order, augmentation
    and dropout from it and the seed: there is no random state.

    Attributes:
        step: number of completed updates.
        best_step: update with the best validation metric so far; of equal ones, that with the lowest loss.
        best_value: that metric.
        best_loss: validation loss of that update.
        best_metric: its name.
        best_data: fingerprint of the validation data that it was measured on.
        stale_evaluations: evaluations since the metric last improved, for early stopping.
        skipped_updates: updates skipped by fp16 loss scaling or because they were not finite.
        consecutive_skipped: updates that fp16 loss scaling skipped since the last applied one.
        consecutive_nonfinite: updates that were skipped since the last applied one because they were not finite.
        unreadable_images: samples skipped because their image could not be read; counted again in each epoch.
        consecutive_unreadable: updates in a row, up to this one, without a readable image.
        train_seconds: time spent in updates, evaluation and saving not counted.
        samples: samples trained on in that time.
        grad_norm: of the last update, before clipping.
        loss_sum: sum of the losses of all updates that were finite.
        loss_count: number of updates in `loss_sum`.
        logged_step: update of the last log.
        logged_loss_sum: `loss_sum` at `logged_step`.
        logged_loss_count: `loss_count` at `logged_step`.
        last_evaluated_step: last update whose due evaluation has been made; a run that was stopped before
            that evaluates when it is resumed.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best_loss: float | None = None
    best_metric: str | None = None
    best_data: str | None = None
    stale_evaluations: int = 0
    skipped_updates: int = 0
    consecutive_skipped: int = 0
    consecutive_nonfinite: int = 0
    unreadable_images: int = 0
    consecutive_unreadable: int = 0
    train_seconds: float = 0.0
    samples: int = 0
    grad_norm: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    logged_step: int = 0
    logged_loss_sum: float = 0.0
    logged_loss_count: int = 0
    last_evaluated_step: int = 0

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Progress":
        """Reads the fields of a checkpoint. Older checkpoints have other names for some of them."""
        return cls(**{_FORMER_NAMES.get(name, name): value for name, value in fields.items()})

    @property
    def mean_loss(self) -> float:
        """Mean loss over the updates since the last log; NaN if none of them was finite."""
        count = self.loss_count - self.logged_loss_count
        return (self.loss_sum - self.logged_loss_sum) / count if count else math.nan

    def finish_update(self, update: Update, samples: int, seconds: float) -> None:
        """Goes to the next step, also after an update that was skipped.

        Args:
            update: the results of the update.
            samples: number of its samples, over all processes.
            seconds: that it took.
        """
        self.step += 1
        self.samples += samples
        self.train_seconds += seconds
        self.unreadable_images += update.unreadable
        self.consecutive_unreadable = self.consecutive_unreadable + 1 if update.unreadable == samples else 0
        if update.nonfinite:
            self.skipped_updates += 1
            self.consecutive_nonfinite += 1
            return
        self.loss_sum += update.loss
        self.loss_count += 1
        self.grad_norm = update.grad_norm
        if update.skipped:
            self.skipped_updates += 1
            self.consecutive_skipped += 1
        else:
            self.consecutive_skipped = self.consecutive_nonfinite = 0

    def note_log(self) -> None:
        """Resets `mean_loss`: the next mean starts here."""
        self.logged_step, self.logged_loss_sum, self.logged_loss_count = self.step, self.loss_sum, self.loss_count

    def note_evaluation(self, value: float, loss: float, lower_is_better: bool) -> bool:
        """Adds an evaluation; returns whether it is the best so far.

        Args:
            value: metric that selects the best update.
            loss: validation loss, which decides between equal metrics.
            lower_is_better: whether a lower metric is the better one.
        """
        before = self.best_value
        # A metric that is not a number is better than none, and worse than any.
        improved = before is None or math.isnan(before) or (value < before if lower_is_better else value > before)
        wins_tie = value == before and self.best_loss is not None and loss < self.best_loss
        self.stale_evaluations = 0 if improved else self.stale_evaluations + 1
        if improved or wins_tie:
            self.best_step, self.best_value, self.best_loss = self.step, value, loss
        return improved or wins_tie

    def is_over(self, total_steps: int, patience: int | None) -> bool:
        """Whether all updates are done, or early stopping (`patience` evaluations) ends the run."""
        return self.step >= total_steps or (patience is not None and self.stale_evaluations >= patience)

    def forget_best(self) -> None:
        """Makes the next evaluation the best so far."""
        self.best_step = self.best_value = self.best_loss = None
