"""The end of a run: writes the adapter or model, checks that it classifies as what was trained, records the results."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_dist import adapters, bundle
from lora_dist.card import model_card
from lora_dist.cli import flatten
from lora_dist.config import Settings
from lora_dist.data import ImageData
from lora_dist.evaluation import Evaluation
from lora_dist.loop import Job
from lora_dist.model import Base, load_base_of, load_trained, make_trainable
from lora_dist.output import Output, write_json
from lora_dist.report import write_evaluation
from lora_dist.runtime import environment
from lora_dist.state import Progress

CHECKED_IMAGES = 8


def hand_over(
    job: Job,
    progress: Progress,
    evaluation: Evaluation,
    base: Base,
    data: ImageData,
    parameters: tuple[int, int],
    output: Output,
) -> None:
    """Writes what a run leaves behind. Called on every process; the first one writes.

    Args:
        job: its model holds the best weights.
        progress: at the end.
        evaluation: of those weights.
        base: that the run began with.
        data: that it trained on.
        parameters: trainable and all.
        output: where to write.
    """
    accelerator, tracker = job.engine.accelerator, job.tracker
    trained = job.engine.trained()
    images = [data.validation.image(index) for index in range(min(CHECKED_IMAGES, len(data.validation)))]
    expected = _logits(job, images)
    if accelerator.is_main_process:
        results = _results(job, progress, evaluation, base, data, parameters)
        write_evaluation(output.evaluation, evaluation, data.labels)
        written = _write_bundle(job.settings, trained, evaluation, data, results, output)
        tolerance = bundle.TOLERANCE if accelerator.mixed_precision == "no" else bundle.HALF_PRECISION_TOLERANCE
        write_json(output.results, results)
        bundle.require_same_logits(written, images, expected, tolerance, job.settings.model.trust_remote_code)
        tracker.hyperparameters(flatten(job.settings), evaluation.metrics)
        tracker.say(f"accuracy {evaluation.metrics['accuracy']:.4f}; wrote {written}")
        tracker.close()
    accelerator.wait_for_everyone()


def _results(
    job: Job, progress: Progress, evaluation: Evaluation, base: Base, data: ImageData, parameters: tuple[int, int]
) -> dict[str, Any]:
    trainable, total = parameters
    return {
        **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
        "eval_samples": len(data.validation),
        "train_loss": progress.loss_sum / max(1, progress.step),
        "train_runtime": progress.train_seconds,
        "train_samples": len(data.train),
        "train_samples_per_second": progress.samples / max(progress.train_seconds, 1e-9),
        "trainable_params": trainable,
        "all_params": total,
        "epoch": job.order.samples_before(progress.step) / job.order.num_samples,
        "step": progress.step,
        "best_step": progress.best_step,
        "skipped_updates": progress.skipped_updates,
        "effective_batch": job.order.effective_batch,
        "data_fingerprint": {"train": data.train.fingerprint(), "validation": data.validation.fingerprint()},
        "base_model": base.identity(),
        **environment(job.engine.accelerator),
    }


@torch.inference_mode()
def _logits(job: Job, images: list[Image.Image]) -> Tensor:
    """What the trained model says of some images, on every process alike."""
    pixels = job.evaluator.transforms.batch(images).to(job.engine.accelerator.device)
    return job.engine.model(pixel_values=pixels).logits.float().cpu()


def _write_bundle(
    settings: Settings,
    trained: dict[str, Tensor],
    evaluation: Evaluation,
    data: ImageData,
    results: dict[str, Any],
    output: Output,
) -> Path:
    """Puts the trained tensors into a fresh model, whatever engine they come from, and writes that."""
    is_adapter = settings.model.tuning != "full"
    base = load_base_of(settings, data.labels)
    model = make_trainable(base, settings.model, settings.lora)
    load_trained(model, trained)
    card = model_card(
        title=output.root.resolve().name,
        is_adapter=is_adapter,
        base_model=base.name,
        start=settings.model.adapter_name_or_path,
        data=settings.data.dataset_name or settings.data.train_dir or "",
        labels=data.labels,
        per_class=evaluation.per_class,
        results=results,
        settings=flatten(settings),
    )
    if not is_adapter:
        bundle.write_model(output.model, model, base.processor, card)
        return output.model
    initial = output.adapter_init if adapters.mutates_base(model) else None
    bundle.write_adapter(output.adapter, model, base, card, initial)
    return output.adapter
