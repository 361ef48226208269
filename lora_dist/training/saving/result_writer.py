"""What a run hands over: the adapter or model, to the Hub as it gets better, and checked and recorded at the end."""

import logging
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from lora_dist.data.sources.load import ImageData
from lora_dist.errors import ProcessError, UserError
from lora_dist.model import adapters, bundle
from lora_dist.model.backbone import Base, load_base_of
from lora_dist.model.parity import HALF_PRECISION_TOLERANCE, TOLERANCE, require_same_logits
from lora_dist.model.trainable import load_trained, make_trainable
from lora_dist.processes.runtime import environment
from lora_dist.settings.cli import flatten
from lora_dist.settings.train import Settings
from lora_dist.training.evaluation import Evaluation
from lora_dist.training.reporting.report import write_evaluation
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.card import model_card
from lora_dist.training.saving.output import Output, write_json
from lora_dist.training.saving.publisher import Publisher, Push
from lora_dist.training.saving.state import Progress

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 8


class ResultNotWrittenError(ProcessError):
    """The process that writes could not write the result; the others learn of it."""

    exit_code = 1


@dataclass(frozen=True)
class ResultWriter:
    """What a run hands over, with each best evaluation to the Hub and at its end. Methods are called on every process.

    Attributes:
        base: that the run began with.
        data: that it trained on.
        parameters: trainable and all.
        made_with: the settings, flat, for the card.
        output: where to write.
        publisher: pushes to the Hub; None on other processes than the first, and where nothing is pushed.
    """

    base: Base
    data: ImageData
    parameters: tuple[int, int]
    made_with: dict[str, Any]
    output: Output
    publisher: Publisher | None
    _loaded: list[tuple[Base, nn.Module]] = field(default_factory=list)

    def push_best(self, run: TrainingRun, progress: Progress, evaluation: Evaluation) -> None:
        """Has the model as it is, which is the best so far, pushed to the Hub; whatever fails is no more than said.

        Args:
            run: its model holds the best weights.
            progress: so far.
            evaluation: of those weights.
        """
        if not run.settings.hub.push_to_hub:
            return
        trained = run.engine.trainable_state()
        if self.publisher is None or not all(tensor.isfinite().all() for tensor in trained.values()):
            return
        directory = self.output.outbox / f"step-{progress.step:08d}"
        try:
            self._write(directory, run, trained, evaluation, self._results(run, progress, evaluation))
        except (OSError, SafetensorError, UserError) as error:
            logger.warning("cannot write what is to be pushed to the Hub: %s", error)
            return
        self.publisher.push(Push(directory, _message(run, progress), passes=True))

    def finalize(self, run: TrainingRun, progress: Progress, evaluation: Evaluation) -> None:
        """Writes what a run leaves behind, and checks that it classifies as what was trained.

        Args:
            run: its model holds the best weights.
            progress: at the end.
            evaluation: of those weights.
        """
        run.watch.now("writing the result", first=True)
        accelerator, tracker, validation = run.engine.accelerator, run.tracker, self.data.validation
        trained = run.engine.trainable_state()
        images = [validation.image(index) for index in np.flatnonzero(evaluation.predictions >= 0)[:CHECKED_IMAGES]]
        expected = _logits(run, images) if images else None
        if accelerator.is_main_process:
            results = self._results(run, progress, evaluation)
            written = self._result(run)
            try:
                self._write(written, run, trained, evaluation, results)
                write_evaluation(self.output.evaluation, evaluation, self.data.labels)
                write_json(self.output.results, results)
            except (OSError, SafetensorError) as error:
                self._write_elsewhere(error, run, trained, evaluation, results)
            tolerance = TOLERANCE if accelerator.mixed_precision == "no" else HALF_PRECISION_TOLERANCE
            if expected is not None:
                require_same_logits(written, images, expected, tolerance, run.settings.model.trust_remote_code)
            else:
                logger.warning("%s is not checked: no validation image has finite logits", written)
            tracker.hyperparameters(flatten(run.settings), evaluation.metrics)
            tracker.say(f"accuracy {evaluation.metrics['accuracy']:.4f}; wrote {written}")
            tracker.close()
        accelerator.wait_for_everyone()

    def _write_elsewhere(
        self,
        error: Exception,
        run: TrainingRun,
        trained: dict[str, Tensor],
        evaluation: Evaluation,
        results: dict[str, Any],
    ) -> NoReturn:
        """Puts the result of a run whose directory cannot be written to where temporary files go."""
        saved, reason = run.checkpointer.saved_step, f"cannot write the result to {self.output.root}: {error}."
        resume = "" if saved is None else f" Make room, then --resume_from_checkpoint auto goes on from update {saved}."
        try:
            rescue = Path(tempfile.mkdtemp(prefix="lora_dist-"))
            self._write(rescue / self._result(run).name, run, trained, evaluation, results)
            write_json(rescue / self.output.results.name, results)
        except (OSError, SafetensorError) as second:
            raise ResultNotWrittenError(f"{reason} Nor elsewhere: {second}.{resume}") from error
        raise ResultNotWrittenError(f"{reason} It is in {rescue}.{resume}") from error

    def publish(self, run: TrainingRun, progress: Progress) -> None:
        """Pushes the result to the Hub, where that was asked for, and waits for it; a failure is no more than said."""
        if self.publisher is not None:
            self.publisher.finish(Push(self._result(run), _message(run, progress), passes=False))
            shutil.rmtree(self.output.outbox, ignore_errors=True)

    def _result(self, run: TrainingRun) -> Path:
        return self.output.model if run.settings.model.tuning == "full" else self.output.adapter

    def _results(self, run: TrainingRun, progress: Progress, evaluation: Evaluation) -> dict[str, Any]:
        trainable, total = self.parameters
        return {
            **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
            "eval_samples": evaluation.num_samples,
            "train_loss": progress.loss_sum / max(1, progress.loss_count),
            "train_runtime": progress.train_seconds,
            "train_samples": len(self.data.train),
            "train_samples_per_second": progress.samples / max(progress.train_seconds, 1e-9),
            "trainable_params": trainable,
            "all_params": total,
            "epoch": run.order.samples_before(progress.step) / run.order.num_samples,
            "step": progress.step,
            "best_step": progress.best_step,
            "skipped_updates": progress.skipped_updates,
            "unreadable_images": {
                "train": progress.unreadable_images,
                "validation": len(self.data.validation) - evaluation.num_samples,
            },
            "effective_batch": run.order.effective_batch,
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
        evaluation: Evaluation,
        results: dict[str, Any],
    ) -> None:
        """Puts the trained tensors into a fresh model, whatever engine they come from, and writes that."""
        settings = run.settings
        base, model = self._fresh_model(settings)
        load_trained(model, trained)
        card = model_card(
            title=self.output.root.resolve().name,
            tuning=settings.model.tuning,
            base_model=base.name,
            base_is_on_hub=base.revision is not None,
            start=settings.model.adapter_name_or_path,
            data=settings.data.dataset_name or settings.data.train_dir or "",
            data_is_on_hub=bool(settings.data.dataset_name) and not Path(settings.data.dataset_name or "").exists(),
            name_on_hub=self.publisher.name if self.publisher else None,
            labels=self.data.labels,
            per_class=evaluation.per_class,
            results=results,
            settings=self.made_with,
        )
        if settings.model.tuning != "full":
            initial = self.output.adapter_init if adapters.mutates_base(model) else None
            bundle.write_adapter(directory, model, base, card, initial)
        else:
            bundle.write_model(directory, model, base.processor, card)

    def _fresh_model(self, settings: Settings) -> tuple[Base, nn.Module]:
        """A model to put trained tensors into, loaded once: the Hub is asked for nothing in the middle of a run."""
        if not self._loaded:
            base = load_base_of(settings, self.data.labels, self.base.revision)
            base = replace(base, processor=self.base.processor)
            self._loaded.append((base, make_trainable(base, settings.model, settings.lora)))
        return self._loaded[0]


@torch.inference_mode()
def _logits(run: TrainingRun, images: list[Image.Image]) -> Tensor:
    """What the trained model says of some images, on every process alike."""
    pixels = run.evaluator.transforms.batch(images).to(run.engine.accelerator.device)
    return run.engine.model(pixel_values=pixels).logits.float().cpu()


def _message(run: TrainingRun, progress: Progress) -> str:
    """Of the commit: which weights these are, and how good."""
    name = run.settings.optimization.metric_for_best_model
    if progress.best_step is None or progress.best_value is None:
        return f"Step {progress.step}"
    return f"Step {progress.best_step}: {name} {progress.best_value:.4f}"
