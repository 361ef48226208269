"""Writes the result of a run: the best model so far for the Hub, and at the end the checked adapter or model."""

import gc
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from lora_dist.data.sources.load import ImageData
from lora_dist.engines.bf16_base import cast_base
from lora_dist.engines.engine import unsharded
from lora_dist.errors import ProcessError, UserError
from lora_dist.figures import reliability_picture
from lora_dist.model.base.backbone import Base, load_base_of_run
from lora_dist.model.base.license import license_of
from lora_dist.model.lora import adapters
from lora_dist.model.lora.trainable import load_trained, make_trainable
from lora_dist.model.trained import bundle
from lora_dist.model.trained.parity import HALF_PRECISION_TOLERANCE, TOLERANCE, require_same_logits, without_tf32
from lora_dist.model.trained.temperature import Calibration, fold
from lora_dist.processes.runtime import environment
from lora_dist.settings.cli import flatten
from lora_dist.settings.train import Settings
from lora_dist.training.probe import in_words, read_probe
from lora_dist.training.problems.problem_types import EvaluationResult
from lora_dist.training.reporting.report import (
    explain_worst,
    headline_lines,
    measured,
    slice_lines,
    warn_of_chance_level,
    write_evaluation,
)
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.model_card import ModelCard, Reference
from lora_dist.training.saving.output import Output, write_json
from lora_dist.training.saving.publisher import Publisher, Push
from lora_dist.training.temperature_fit import MIN_IMAGES, CalibrationReport, calibrate

logger = logging.getLogger(__name__)

BF16_BASE_TOLERANCE = 1e-1
"""Largest relative difference of logits with a base in bf16; the rounding of a tiny MobileViT reached 5.3e-2."""

CHECKED_IMAGES = 8
RELIABILITY = "reliability.png"


class ResultNotWrittenError(ProcessError):
    """The result could not be written. Raised on the main process, which informs the others."""

    exit_code = 1


@dataclass(frozen=True)
class ResultWriter:
    """Writes the adapter or model of a run, with its card and records. Methods must be called on every process.

    Attributes:
        parameters: numbers of trainable and of all parameters.
        made_with: the settings by flat name, for the card.
        publisher: pushes to the Hub; None except on the main process of a run with --push_to_hub.
    """

    base: Base
    data: ImageData
    parameters: tuple[int, int]
    made_with: dict[str, Any]
    output: Output
    publisher: Publisher | None
    _loaded: list[tuple[Base, nn.Module]] = field(default_factory=list)

    def push_best(self, run: TrainingRun, evaluation: EvaluationResult) -> None:
        """Writes the current best model for the Hub and queues the upload. Failures are logged; the run goes on."""
        if not run.settings.hub.push_to_hub:
            return
        trained = run.result_weights()
        if self.publisher is None or not all(tensor.isfinite().all() for tensor in trained.values()):
            return
        directory = self.output.outbox / f"step-{run.progress.step:08d}"
        try:
            self._write(directory, run, trained, evaluation, self._results(run, evaluation), None)
        except (OSError, SafetensorError, UserError) as error:
            logger.warning("cannot write the files for the Hub: %s", error)
            return
        self.publisher.push(Push(directory, _message(run), is_temporary=True))

    def finalize(self, run: TrainingRun, evaluation: EvaluationResult, test: EvaluationResult | None = None) -> None:
        """Writes the result, and checks that it gives the logits of the trained model when it is read back.

        Args:
            run: the run, whose model holds the best weights.
            evaluation: metrics of the best weights.
            test: the same on the test data.

        Raises:
            ResultNotWrittenError: the directory cannot be written to.
        """
        run.watch.enter("writing the result", extra_time=True)
        trained = run.engine.trainable_state()
        indices = np.flatnonzero(np.isfinite(evaluation.losses))[:CHECKED_IMAGES]
        images = [self.data.validation.image(index, run.evaluator.transforms.conversion) for index in indices]
        expected = _logits(run, images) if images else None
        if run.engine.accelerator.is_main_process:
            report = None
            if evaluation.scored is not None:
                report = calibrate(evaluation.scored, None if test is None else test.scored)
            results = self._results(run, evaluation, test)
            results |= {} if report is None else {"calibration": report.record()}
            remaining = self._write_files(run, trained, evaluation, results, report)
            self._explain_worst(run, evaluation)
            if expected is not None:
                scale = 1.0 if report is None else remaining.temperature / report.temperature
                self._check(run, images, expected * scale)
            else:
                logger.warning("%s is not checked: no validation image has finite logits", self._result(run))
            self._report(run, results, evaluation, test, report)
        run.engine.accelerator.wait_for_everyone()

    def _write_files(
        self,
        run: TrainingRun,
        trained: dict[str, Tensor],
        evaluation: EvaluationResult,
        results: dict[str, Any],
        report: CalibrationReport | None,
    ) -> Calibration:
        """Writes all files of the result; returns the calibration that is not part of the weights."""
        problem, labels = run.evaluator.problem, self.data.labels
        try:
            remaining = self._write(self._result(run), run, trained, evaluation, results, report)
            write_evaluation(self.output.evaluation, problem, evaluation, labels)
            problem.write_predictions(self.output.predictions, evaluation, self.data.validation, labels)
            write_json(self.output.results, results)
        except (OSError, SafetensorError) as error:
            raise ResultNotWrittenError(
                f"cannot write the result to {self.output.root}: {error}. Free space, then: {run.resume_hint}"
            ) from error
        return remaining

    def _explain_worst(self, run: TrainingRun, evaluation: EvaluationResult) -> None:
        _, model = self._fresh_model(run.settings)
        explain_worst(run.tracker, run.evaluator, model, evaluation, run.progress.step)
        del model
        # The check loads the base once more. Wrapped modules hold each other.
        self._loaded.clear()
        gc.collect()

    def _report(
        self,
        run: TrainingRun,
        results: dict[str, Any],
        evaluation: EvaluationResult,
        test: EvaluationResult | None,
        report: CalibrationReport | None,
    ) -> None:
        """Logs the result, and closes the tracker."""
        tracker = run.tracker
        tracker.hyperparameters(flatten(run.settings), evaluation.metrics)
        for line in self._summary(run, results, evaluation, test):
            tracker.say(line)
        if report is not None:
            tracker.say(str(report))
            for picture in _pictures(report).values():
                tracker.picture("calibration/reliability", picture, run.progress.step)
        tracker.close()
        # Below the progress bar, which ends here.
        warn_of_chance_level(run.evaluator.problem, evaluation)

    def _summary(
        self, run: TrainingRun, results: dict[str, Any], evaluation: EvaluationResult, test: EvaluationResult | None
    ) -> Iterator[str]:
        """Yields the metrics of the result as lines of the log."""
        if "probe_accuracy" in results:
            tuning = {"lora": "LoRA", "head": "head", "full": "full training"}[run.settings.model.tuning]
            yield f"{in_words(results)}, {tuning} {evaluation.metrics[run.evaluator.problem.headline]:.4f}"
        yield from slice_lines(evaluation.slices)
        yield from headline_lines(evaluation)
        if test is not None:
            yield "on the test data:"
            yield from (f"  {line}" for line in headline_lines(test))
        yield f"wrote {self._result(run)}"

    def _check(self, run: TrainingRun, images: list[Image.Image], expected: Tensor) -> None:
        """Checks that the written result gives the logits of the trained model."""
        in_bf16 = run.settings.model.base_dtype == "bfloat16"
        in_fp32 = run.engine.accelerator.mixed_precision == "no"
        tolerance = BF16_BASE_TOLERANCE if in_bf16 else TOLERANCE if in_fp32 else HALF_PRECISION_TOLERANCE
        prepare = partial(_as_trained, run.engine.accelerator, self.base.heads if in_bf16 else None)
        remote = run.settings.model.trust_remote_code
        require_same_logits(self._result(run), images, expected, tolerance, remote, prepare)

    def publish(self, run: TrainingRun) -> None:
        """Pushes the result to the Hub if requested, and waits for it. A failure is logged."""
        if self.publisher is not None:
            self.publisher.finish(Push(self._result(run), _message(run), is_temporary=False))
            shutil.rmtree(self.output.outbox, ignore_errors=True)

    def _result(self, run: TrainingRun) -> Path:
        return self.output.model if run.settings.model.tuning == "full" else self.output.adapter

    def _results(
        self, run: TrainingRun, evaluation: EvaluationResult, test: EvaluationResult | None = None
    ) -> dict[str, Any]:
        progress, (trainable, total) = run.progress, self.parameters
        tested: dict[str, Any] = {}
        if test is not None and self.data.test is not None:
            tested = {f"test_{name}": value for name, value in measured(test).items()}
            tested |= {"test_samples": test.num_samples, "test_fingerprint": self.data.test.fingerprint()}
            tested["test_per_class"] = dict(zip(self.data.labels, test.per_class, strict=True))
        return {
            **{f"eval_{name}": value for name, value in measured(evaluation).items()},
            "eval_samples": evaluation.num_samples,
            **tested,
            **(read_probe(self.output.probe) if run.settings.run.probe else {}),
            "train_loss": progress.loss_sum / max(1, progress.loss_count),
            "train_runtime": progress.train_seconds,
            "train_samples": len(self.data.train),
            "train_samples_per_second": progress.samples / max(progress.train_seconds, 1e-9),
            "trainable_params": trainable,
            "all_params": total,
            "epoch": run.plan.samples_before(progress.step) / run.plan.num_samples,
            "step": progress.step,
            "best_step": progress.best_step,
            "skipped_updates": progress.skipped_updates,
            "unreadable_images": {
                "train": progress.unreadable_images,
                "validation": len(self.data.validation) - evaluation.num_samples,
            },
            "effective_batch": run.plan.effective_batch,
            "data_fingerprint": {
                "train": self.data.train.fingerprint(),
                "validation": self.data.validation.fingerprint(),
            },
            "base_model": self.base.identity(),
            **environment(run.engine.accelerator),
        }

    def _write(
        self,
        directory: Path,
        run: TrainingRun,
        trained: dict[str, Tensor],
        evaluation: EvaluationResult,
        results: dict[str, Any],
        report: CalibrationReport | None,
    ) -> Calibration:
        """Loads the trained tensors into a fresh copy of the base, which no engine has wrapped, and writes it.

        Returns:
            The calibration of the result: the temperature becomes part of the head of a whole model, but not of an
            adapter, from which training may go on.
        """
        settings = run.settings
        base, model = self._fresh_model(settings)
        load_trained(model, trained)
        calibration = Calibration() if report is None else Calibration(report.temperature)
        if settings.model.tuning == "full":
            calibration = fold(model, calibration)
        pictures = _pictures(report)
        card = self._card(run, evaluation, results, calibration, next(iter(pictures), None))
        decision = run.evaluator.problem.decision(evaluation)
        records = bundle.Records(run.evaluator.transforms.conversion, calibration, decision)
        if settings.model.tuning != "full":
            initial = self.output.adapter_init if adapters.mutates_base(model) else None
            bundle.write_adapter(directory, model, base, card, initial, records, pictures)
        else:
            bundle.write_model(directory, model, base.processor, card, records, pictures)
        return calibration

    def _card(
        self,
        run: TrainingRun,
        evaluation: EvaluationResult,
        results: dict[str, Any],
        calibration: Calibration,
        reliability: str | None,
    ) -> str:
        """The model card as text. `reliability` is the file name of the reliability diagram."""
        data, model = run.settings.data, run.settings.model
        base = Reference(self.base.name, is_on_hub=self.base.revision is not None)
        card = ModelCard(
            title=self.output.root.resolve().name,
            tuning=model.tuning,
            base=base,
            data=Reference(
                data.dataset_name or data.train_dir or "",
                is_on_hub=bool(data.dataset_name) and not Path(data.dataset_name or "").exists(),
            ),
            problem=run.evaluator.problem,
            labels=self.data.labels,
            per_class=evaluation.per_class,
            results=results,
            settings=self.made_with,
            start=model.adapter_name_or_path,
            name_on_hub=self.publisher.name if self.publisher else None,
            license_=license_of(base.name, self.base.revision, base.is_on_hub),
            calibration=calibration,
            reliability=reliability,
        )
        return str(card)

    def _fresh_model(self, settings: Settings) -> tuple[Base, nn.Module]:
        """The model to load trained tensors into. Loaded once, so that a run does not depend on the Hub later."""
        if not self._loaded:
            kept = self.base
            base = load_base_of_run(
                settings, self.data.labels, kept.revision, fit_classes=False, processor=kept.processor
            )
            self._loaded.append((base, make_trainable(base, settings.model, settings.lora)))
        return self._loaded[0]


def _pictures(report: CalibrationReport | None) -> dict[str, Image.Image]:
    """The reliability diagram for the card, under its file name, if there are enough images for one."""
    if report is None or report.images < MIN_IMAGES:
        return {}
    measured = {"before": report.before, "after": report.after} if report.reason is None else {"raw": report.before}
    headings = {f"{when}: calibration error {one.calibration_error:.4f}": one for when, one in measured.items()}
    return {RELIABILITY: reliability_picture({heading: one.reliability for heading, one in headings.items()})}


def _as_trained(accelerator: Accelerator, heads_beside_bf16: list[str] | None, model: nn.Module) -> nn.Module:
    """Makes a loaded model compute as in training; with heads, the rest of its base in bf16."""
    if heads_beside_bf16 is not None:
        # PEFT lets modules that it takes for heads by their names train, as those of PoolFormer.
        cast_base(model.requires_grad_(False), heads_beside_bf16)
    return unsharded(accelerator, model)


@torch.inference_mode()
def _logits(run: TrainingRun, images: list[Image.Image]) -> Tensor:
    """The logits of the trained model. Must be called on every process with the same images."""
    pixels = run.evaluator.transforms.batch(images).to(run.engine.accelerator.device)
    with without_tf32():
        return run.engine.model(pixel_values=pixels).logits.float().cpu()


def _message(run: TrainingRun) -> str:
    """Returns the message of the commit on the Hub, such as `Step 120: accuracy 0.9130`."""
    progress, name = run.progress, run.settings.optimization.metric_for_best_model
    if progress.best_step is None or progress.best_value is None:
        return f"Step {progress.step}"
    return f"Step {progress.best_step}: {name} {progress.best_value:.4f}"
