"""The progress of a run: counters that a checkpoint keeps."""

import math
from dataclasses import dataclass
from typing import Any

_FORMER_NAMES = {"blind_updates": "consecutive_unreadable", "settled_step": "last_evaluated_step"}


@dataclass
class Progress:
    """Progress counters of a run.

    There is no random state here: order, augmentation and dropout follow from the seed and from `step`.

    Attributes:
        step: number of completed updates.
        best_step: update with the best validation metric so far; of equal ones, that with the lowest loss.
        best_value: that metric.
        best_loss: validation loss of that update.
        best_metric: its name.
        best_data: fingerprint of the validation data that it was measured on.
        stale_evaluations: evaluations since the metric last improved, for early stopping.
        skipped_updates: updates skipped by fp16 loss scaling or because they were not finite.
        skipped_in_a_row: updates that fp16 loss scaling skipped since the last applied one.
        nonfinite_in_a_row: updates that were skipped since the last applied one because they were not finite.
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
    skipped_in_a_row: int = 0
    nonfinite_in_a_row: int = 0
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

    def note_update(self, loss: float, grad_norm: float, skipped: bool) -> None:
        """Adds an update to the counters, including one that fp16 loss scaling skipped."""
        self.loss_sum += loss
        self.loss_count += 1
        self.grad_norm = grad_norm
        self.skipped_updates += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.nonfinite_in_a_row = self.nonfinite_in_a_row if skipped else 0

    def note_nonfinite(self) -> None:
        """Counts an update that was skipped because it was not finite."""
        self.skipped_updates += 1
        self.nonfinite_in_a_row += 1

    def note_samples(self, samples: int, unreadable: int, seconds: float) -> None:
        """Counts an update, with its samples over all processes and the seconds that it took."""
        self.step += 1
        self.samples += samples
        self.unreadable_images += unreadable
        self.consecutive_unreadable = self.consecutive_unreadable + 1 if unreadable == samples else 0
        self.train_seconds += seconds

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

    def forget_best(self) -> None:
        """Makes the next evaluation the best so far."""
        self.best_step = self.best_value = self.best_loss = None
