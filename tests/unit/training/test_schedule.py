"""Durations, the learning rate against transformers', and when something is due."""

import pytest
import torch
from transformers import get_scheduler

from lora_dist.settings.train import OptimizationSettings
from lora_dist.training.schedule import Schedule, is_due, total_steps


def test_a_floor_is_that_of_cosine_with_min_lr_and_the_end_of_a_linear_schedule() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    floor = {"min_lr": 0.03}
    reference = get_scheduler("cosine_with_min_lr", optimizer, 3, 20, scheduler_specific_kwargs=floor)
    cosine, linear = (
        Schedule.of(OptimizationSettings(learning_rate=0.3, lr_scheduler_type=kind, max_train_steps=20, **more), 9)
        for kind, more in (("cosine", floor | {"warmup_steps": 3}), ("linear", floor))
    )
    for step in range(21):
        assert cosine.learning_rate(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        assert linear.learning_rate(step) == pytest.approx(0.3 - 0.27 * step / 20, abs=1e-12)
        optimizer.step()
        reference.step()


def test_durations() -> None:
    assert total_steps(5, None, 4) == 20
    assert total_steps(0.3, None, 4) == 2
    assert total_steps(0.001, None, 4) == 1
    assert total_steps(5, 3, 4) == 3
    assert Schedule.of(OptimizationSettings(warmup_ratio=0.1, num_train_epochs=3), 5).warmup_steps == 2


def test_what_is_due_when() -> None:
    due = [step for step in range(1, 12) if is_due("epoch", step, 4, 11)]
    assert due == [4, 8, 11]
    assert [step for step in range(1, 12) if is_due(5, step, 4, 11)] == [5, 10, 11]
    assert not any(is_due("no", step, 4, 11) for step in range(1, 12))


@pytest.mark.parametrize(("warmup", "total"), [(0, 20), (1, 20), (7, 20), (0, 1), (5, 5), (9, 5), (4, 5)])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_is_that_of_transformers(kind: str, warmup: int, total: int) -> None:
    """Also with a warm-up as long as the run, or longer, and in a run of one update."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    schedule = Schedule(0.3, kind.partition("_")[0], warmup, total)  # type: ignore[arg-type]
    for step in range(total):
        assert schedule.learning_rate(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_rate_ends_at_zero_and_stays_there(kind: str) -> None:
    schedule = Schedule(0.3, kind, 2, 10)  # type: ignore[arg-type]
    assert schedule.learning_rate(9) > 0
    assert schedule.learning_rate(10) == pytest.approx(0)
    assert schedule.learning_rate(2) == 0.3


def test_warm_up_in_updates_and_as_a_share_agree() -> None:
    given = [
        Schedule.of(OptimizationSettings(max_train_steps=40, **warmup), 7)
        for warmup in ({"warmup_steps": 10}, {"warmup_ratio": 0.25})
    ]
    assert given[0] == given[1]
    assert given[0].total_steps == 40
