"""The counters of a run: which evaluation is the best, and how many updates were skipped."""

import pytest

from lora_dist.training.progress import Progress
from lora_dist.training.step import Update


@pytest.mark.parametrize(
    ("lower_is_better", "values"), [(False, (0.5, 0.4, 0.7, 0.7, 0.6)), (True, (0.5, 0.6, 0.3, 0.3, 0.4))]
)
def test_the_best_evaluation_is_the_first_of_those_with_the_best_metric_and_loss(
    lower_is_better: bool, values: tuple[float, ...]
) -> None:
    progress = Progress()
    better = []
    for step, value in enumerate(values, 1):
        progress.step = step
        better.append(progress.note_evaluation(value, 1.0, lower_is_better))
    assert better == [True, False, True, False, False]
    assert (progress.best_step, progress.best_value, progress.stale_evaluations) == (3, values[2], 2)


def test_of_equal_metrics_the_one_with_the_lower_loss_is_the_best_without_ending_the_patience() -> None:
    progress = Progress()
    better = []
    for progress.step, loss in enumerate((0.527, 0.478, 0.5, float("nan"), 0.478), 1):
        better.append(progress.note_evaluation(0.75, loss, lower_is_better=False))
    assert better == [True, True, False, False, False]
    assert (progress.best_step, progress.best_loss, progress.stale_evaluations) == (2, 0.478, 4)


def test_updates_that_loss_scaling_skips_are_not_counted_as_not_finite() -> None:
    progress = Progress()
    skipped = Update(loss=1.0, grad_norm=0.0, skipped=True, unreadable=0, requests=[])
    for update in (skipped, skipped, Update(float("nan"), float("nan"), False, 0, [], "loss")):
        progress.finish_update(update, samples=4, seconds=1.0)
    assert (progress.consecutive_skipped, progress.consecutive_nonfinite, progress.skipped_updates) == (2, 1, 3)
    assert progress.mean_loss == 1.0
    progress.finish_update(skipped._replace(skipped=False), samples=4, seconds=1.0)
    assert (progress.consecutive_skipped, progress.consecutive_nonfinite, progress.step) == (0, 0, 4)


def test_a_best_of_an_older_checkpoint_has_no_loss_and_wins_a_tie() -> None:
    progress = Progress(step=2, best_step=1, best_value=0.75)
    assert not progress.note_evaluation(0.75, 0.1, lower_is_better=False)


def test_a_metric_that_is_not_a_number_is_beaten_by_any_other() -> None:
    progress = Progress()
    assert progress.note_evaluation(float("nan"), float("nan"), lower_is_better=True)
    assert progress.note_evaluation(3.0, 3.0, lower_is_better=True)
    assert not progress.note_evaluation(float("nan"), float("nan"), lower_is_better=True)
    assert progress.best_value == 3.0
