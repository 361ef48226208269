"""The end of a run: writes the adapter or model, checks that it classifies as what was trained, records the results."""

from pathlib import Path
from typing import Any

from lora_dist import adapters, bundle
from lora_dist.card import model_card
from lora_dist.cli import flatten
from lora_dist.data import ImageData
from lora_dist.evaluation import Evaluation
from lora_dist.loop import Job
from lora_dist.model import Base
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
    accelerator, tracker = job.accelerator, job.tracker
    if accelerator.is_main_process:
        results = _results(job, progress, evaluation, base, data, parameters)
        write_evaluation(output.evaluation, evaluation, data.labels)
        written = _write_bundle(job, evaluation, base, data, results, output)
        write_json(output.results, results)
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
        **environment(job.accelerator),
    }


def _write_bundle(
    job: Job, evaluation: Evaluation, base: Base, data: ImageData, results: dict[str, Any], output: Output
) -> Path:
    settings = job.settings
    is_adapter = settings.model.tuning != "full"
    model = job.accelerator.unwrap_model(job.model, keep_fp32_wrapper=False)
    card = model_card(
        title=output.root.resolve().name,
        is_adapter=is_adapter,
        base_model=base.name,
        data=settings.data.dataset_name or settings.data.train_dir or "",
        labels=data.labels,
        per_class=evaluation.per_class,
        results=results,
        settings=flatten(settings),
    )
    if is_adapter:
        written = output.adapter
        initial = output.adapter_init if adapters.mutates_base(model) else None
        bundle.write_adapter(written, model, base, card, initial)
    else:
        written = output.model
        bundle.write_model(written, model, base.processor, card)
    images = [data.validation.image(index) for index in range(min(CHECKED_IMAGES, len(data.validation)))]
    bundle.require_same_logits(written, model, images)
    return written
