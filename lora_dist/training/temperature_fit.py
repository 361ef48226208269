"""Fits the temperature of a result at the end of training, and measures its effect."""

from dataclasses import dataclass
from typing import Any

from lora_dist.metrics.calibration import (
    TEMPERATURES,
    Confidences,
    Coverage,
    ReliabilityBin,
    ScoredSamples,
    confidences,
    coverage,
    cross_fitted,
    fit_temperature,
    reliability,
)

MIN_IMAGES = 100
"""Fewer validation images give no temperature."""
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidences in the coverage table."""
CROSS_FITTED = "validation, each half at the temperature of the other half"
ON_TEST = "test"


@dataclass(frozen=True)
class CalibrationReport:
    """The temperature of a result, and its effect.

    Attributes:
        temperature: of the result; 1 if none was fitted.
        images: validation images that it was fitted on.
        reason: why no temperature was fitted; None if one was.
        measured_on: the data from which `before` and `after` come.
        before: calibration error, loss and reliability of the raw probabilities.
        after: the same at the temperature.
        coverage: share and accuracy of the validation images above thresholds of confidence, at the temperature.
    """

    temperature: float
    images: int
    reason: str | None
    measured_on: str
    before: "ConfidenceMeasurement"
    after: "ConfidenceMeasurement"
    coverage: list[Coverage]

    def record(self) -> dict[str, Any]:
        """The report as JSON values, for the results of a run."""
        measured = (("before", self.before), ("after", self.after))
        return {
            "temperature": self.temperature,
            "images": self.images,
            "reason": self.reason,
            "measured_on": self.measured_on,
            **{f"calibration_error_{when}": one.calibration_error for when, one in measured},
            **{f"loss_{when}": one.loss for when, one in measured},
            **{f"reliability_{when}": [row._asdict() for row in one.reliability] for when, one in measured},
            "coverage": [row._asdict() for row in self.coverage],
        }

    def __str__(self) -> str:
        if self.reason is not None:
            return f"no temperature was fitted, and the probabilities stay as they are: {self.reason}"
        return (
            f"fitted the temperature {self.temperature:.3f} on {self.images:,} validation images: the calibration "
            f"error is {self.after.calibration_error:.4f} instead of {self.before.calibration_error:.4f}, measured on "
            f"{self.measured_on}"
        )


@dataclass(frozen=True)
class ConfidenceMeasurement:
    """Calibration error, mean loss, and reliability in intervals of confidence."""

    calibration_error: float
    loss: float
    reliability: list[ReliabilityBin]

    @classmethod
    def of(cls, scored: Confidences) -> "ConfidenceMeasurement":
        """From the confidences of samples."""
        return cls(scored.calibration_error(), float(scored.loss.mean(dtype="float64")), reliability(scored))


def calibrate(validation: ScoredSamples, test: ScoredSamples | None = None) -> CalibrationReport | None:
    """Fits a temperature on validation samples, and measures it on test samples or by cross-fitting.

    The temperature is 1 if the samples are too few, or if the temperature of one half does not lower the loss of the
    other half. Returns None if no sample has finite logits.
    """
    validation, test = _finite(validation), None if test is None else _finite(test)
    images = len(validation.labels)
    if not images:
        return None
    temperature, reason, crossed = _fitted(validation)
    on_test = test is not None and len(test.labels) > 0
    measured = test if test is not None and on_test else validation
    before = confidences(measured)
    after = confidences(measured, temperature) if on_test or crossed is None else crossed
    scored = confidences(validation, temperature)
    return CalibrationReport(
        temperature,
        images,
        reason,
        ON_TEST if on_test else CROSS_FITTED if crossed is not None else "validation",
        ConfidenceMeasurement.of(before),
        ConfidenceMeasurement.of(after),
        coverage(scored.confidence, scored.correct, THRESHOLDS),
    )


def _fitted(validation: ScoredSamples) -> tuple[float, str | None, Confidences | None]:
    """Returns the temperature and the cross-fitted confidences; or 1, the reason, and no confidences."""
    images = len(validation.labels)
    if images < MIN_IMAGES:
        return 1.0, f"the fit takes at least {MIN_IMAGES} validation images, and there are only {images}", None
    temperature, crossed = fit_temperature(validation), cross_fitted(validation)
    if temperature is None or crossed is None:
        low, high = TEMPERATURES
        where = f"at a temperature from {low:g} to {high:g}"
        return 1.0, f"the loss on the validation images, or on one half of them, has no minimum {where}", None
    if not crossed.loss.mean(dtype="float64") < confidences(validation).loss.mean(dtype="float64"):
        return 1.0, "the temperature of one half of the validation images does not lower the loss on the other", None
    return temperature, None, crossed


def _finite(samples: ScoredSamples) -> ScoredSamples:
    return samples.part(samples.logits.isfinite().all(dim=-1))
