"""The temperature is the one that the logits were multiplied by, and what it does is measured on other samples."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_dist.metrics.calibration import (
    ScoredSamples,
    confidences,
    coverage,
    cross_fitted,
    fit_temperature,
    reliability,
)
from lora_dist.training.temperature_fit import CROSS_FITTED, MIN_IMAGES, ON_TEST, calibrate


def drawn(count: int, factor: float = 1.0, seed: int = 0, classes: int = 5) -> ScoredSamples:
    """Labels drawn from the softmax of random logits, which are then multiplied by `factor`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return ScoredSamples(logits * factor, labels)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_is_the_factor_of_the_logits(factor: float) -> None:
    samples = drawn(20_000, factor)
    found = fit_temperature(samples)
    assert found == pytest.approx(factor, rel=0.05)
    assert found is not None
    best = float(cross_entropy(samples.logits / found, samples.labels))
    for other in (found * 0.99, found * 1.01):
        assert best < float(cross_entropy(samples.logits / other, samples.labels))


def test_without_an_error_the_loss_has_no_minimum() -> None:
    logits = torch.eye(3).repeat(50, 1)
    right, wrong = torch.arange(150) % 3, (torch.arange(150) + 1) % 3
    assert fit_temperature(ScoredSamples(logits, right)) is None
    assert fit_temperature(ScoredSamples(logits, wrong)) is None


def test_each_half_is_measured_at_the_temperature_of_the_other() -> None:
    samples = drawn(400, 3.0)
    ascending = samples.labels.argsort(stable=True)
    first, second = ascending[::2], ascending[1::2]
    expected: dict[int, float] = {}
    for own, other in ((first, second), (second, first)):
        temperature = fit_temperature(ScoredSamples(samples.logits[other], samples.labels[other]))
        assert temperature is not None
        loss = cross_entropy(samples.logits[own] / temperature, samples.labels[own], reduction="none")
        expected |= dict(zip(own.tolist(), loss.tolist(), strict=True))
    found = cross_fitted(samples)
    assert found is not None
    assert sorted(found.loss.tolist()) == pytest.approx(sorted(expected.values()))


def test_the_calibration_error_is_the_gap_of_the_reliability_diagram() -> None:
    scored = confidences(drawn(500, 3.0))
    bins = reliability(scored)
    assert sum(row.samples for row in bins) == 500
    gap = sum(row.samples * abs(row.confidence - row.accuracy) for row in bins) / 500
    assert gap == pytest.approx(scored.calibration_error(), rel=1e-6)


def test_coverage_by_hand() -> None:
    logits = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]]).log()
    scored = confidences(ScoredSamples(logits, torch.tensor([0, 1, 1, 1])))
    rows = coverage(scored.confidence, scored.correct, (0.0, 0.6, 0.75, 0.95))
    assert [row.answered for row in rows] == [1, 0.75, 0.5, 0]
    assert [row.accuracy for row in rows] == [0.75, pytest.approx(2 / 3), 0.5, None]


def test_overconfident_samples_are_calibrated_and_the_report_says_on_what() -> None:
    report = calibrate(drawn(1000, 3.0))
    assert report is not None
    assert report.reason is None
    assert report.temperature == pytest.approx(3, rel=0.15)
    assert report.measured_on == CROSS_FITTED
    assert report.after.calibration_error < 0.5 * report.before.calibration_error
    assert report.after.loss < report.before.loss
    tested = calibrate(drawn(1000, 3.0), drawn(700, 3.0, seed=1))
    assert tested is not None
    assert tested.measured_on == ON_TEST
    expected = confidences(drawn(700, 3.0, seed=1), tested.temperature)
    assert tested.after.calibration_error == pytest.approx(expected.calibration_error())
    assert tested.record()["calibration_error_after"] == tested.after.calibration_error
    assert f"temperature {tested.temperature:.3f}" in str(tested)


def test_no_temperature_without_reason_for_one() -> None:
    few = calibrate(drawn(MIN_IMAGES - 1, 3.0))
    assert few is not None
    assert few.temperature == 1
    assert few.before == few.after
    assert f"only {MIN_IMAGES - 1}" in str(few)
    perfect = drawn(200)
    perfect = ScoredSamples(perfect.logits, perfect.logits.argmax(-1))
    assert (calibrate(perfect) or few).temperature == 1
    assert "no minimum" in str(calibrate(perfect))
    # One half has no error, and would be as certain as possible.
    perfect.labels[0] = (perfect.labels[0] + 1) % 5
    assert "no minimum" in str(calibrate(perfect))
    # One half is overconfident and the other one underconfident.
    unlike = drawn(400)
    unlike.logits[unlike.labels.argsort(stable=True)[::2]] *= 4
    assert "does not lower the loss" in str(calibrate(unlike))


def test_samples_without_finite_logits_are_left_out() -> None:
    samples = drawn(300, 3.0)
    samples.logits[::3, 1] = math.nan
    report = calibrate(samples)
    assert report is not None
    assert report.images == 200
    assert np.isfinite(report.after.loss)
    samples.logits[:] = math.nan
    assert calibrate(samples) is None
