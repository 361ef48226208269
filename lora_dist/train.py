"""Fine-tunes an image classifier: `accelerate launch -m lora_dist.train --config NAME|FILE [--setting value …]`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lora_dist.cli import argv_or, flatten, parse
from lora_dist.config import Settings, contradictions
from lora_dist.errors import exit_on_user_error

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from lora_dist.data import ImageData, Split
    from lora_dist.evaluation import Evaluation
    from lora_dist.model import Base
    from lora_dist.output import Output
    from lora_dist.state import Progress
    from lora_dist.transforms import ImageTransforms

logger = logging.getLogger("lora_dist.train")


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Reads the settings, then trains or evaluates."""
    settings = parse(
        Settings,
        argv_or(argv),
        prog="lora_dist.train",
        description="Fine-tune an image classifier with LoRA, on one process or many.",
        contradictions=contradictions,
    )
    # What follows imports torch; a mistake in the settings has been reported by now.
    if settings.run.do_eval_only:
        evaluate_only(settings)
    else:
        train(settings)


def train(settings: Settings) -> dict[str, Any]:
    """Trains, evaluates the best checkpoint, and hands over the adapter. Returns what `all_results.json` holds."""
    from pathlib import Path

    from lora_dist import checkpoint, output, report, runtime, state
    from lora_dist.data import load_data, write_splits
    from lora_dist.loader import TrainImages, train_loader
    from lora_dist.loop import Job, fit
    from lora_dist.model import count_parameters, load_base, make_trainable
    from lora_dist.optimizer import make_optimizer
    from lora_dist.order import Order
    from lora_dist.schedule import Schedule, total_steps, warmup_steps
    from lora_dist.tracking import Tracker
    from lora_dist.transforms import ImageTransforms

    optimization, run = settings.optimization, settings.run
    accelerator = runtime.launch(optimization.mixed_precision)
    runtime.quiet_libraries(accelerator.is_main_process)
    out = output.Output(Path(run.output_dir))
    resumed = output.find_resume(out, run.resume_from_checkpoint)

    with accelerator.main_process_first():
        data = load_data(settings.data, run.seed)
        base = load_base(
            settings.model.model_name_or_path,
            data.labels,
            revision=settings.model.model_revision,
            seed=run.seed,
            init_from_config=settings.model.init_from_config,
            trust_remote_code=settings.model.trust_remote_code,
        )
    transforms = ImageTransforms(base.processor, settings.augmentation)
    model = make_trainable(base, settings.model, settings.lora)
    optimizer = make_optimizer(model, optimization, settings.lora.loraplus_lr_ratio)
    order = Order(
        num_samples=len(data.train),
        per_device_batch=optimization.per_device_train_batch_size,
        accumulation=optimization.gradient_accumulation_steps,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
        seed=run.seed,
    )
    steps = total_steps(optimization.num_train_epochs, optimization.max_train_steps, order.steps_per_epoch)
    warmup = warmup_steps(optimization.warmup_steps, optimization.warmup_ratio, steps)
    schedule = Schedule(optimization.learning_rate, optimization.lr_scheduler_type, warmup, steps)

    if accelerator.is_main_process:
        output.write_config(out, flatten(settings))
        write_splits(data, out.split)
        _keep_initial_adapter(model, out, resumed is None)
    if settings.model.torch_compile:
        model.compile()
    trainable, total = count_parameters(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    identity = {
        "base": base.fingerprint,
        "tuning": settings.model.tuning,
        "seed": run.seed,
        "effective_batch": order.effective_batch,
        "train_data": data.train.fingerprint(),
    }
    progress = state.Progress()
    if resumed is not None:
        progress = state.restore(resumed[1], accelerator, model, optimizer, identity)
        logger.info("resuming from %s, after %d of %d updates", resumed[0], progress.step, steps)
    _announce(settings, accelerator, data, order, steps, trainable, total)

    tracker = Tracker(out.root, enabled=accelerator.is_main_process, first_step=progress.step, total_steps=steps)
    tracker.settings(flatten(settings))
    images = TrainImages(data.train, transforms, settings.augmentation, run.seed)
    report.show_inputs(tracker, images, order, progress.step, data.labels)

    def evaluate_now() -> Evaluation:
        return _evaluate(settings, accelerator, model, data.validation, transforms, data.labels)

    def save(progress: Progress) -> None:
        content = state.capture(accelerator, model, optimizer, progress, identity)
        if accelerator.is_main_process:
            checkpoint.write(out.checkpoints, progress.step, content)
            checkpoint.prune(out.checkpoints, run.save_total_limit, progress.best_step)
        accelerator.wait_for_everyone()

    fit(
        Job(
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            order=order,
            schedule=schedule,
            settings=settings,
            train_batches=lambda step: train_loader(images, order, step, steps, settings.data, accelerator.device),
            sample_name=data.train.name,
            evaluate=evaluate_now,
            save=save,
            show_evaluation=lambda evaluation, progress: report.show_evaluation(
                tracker, evaluation, progress.step, data.validation, data.labels
            ),
        ),
        progress,
        tracker,
    )
    if progress.best_step not in (None, progress.step):
        best = checkpoint.read(checkpoint.path_of(out.checkpoints, progress.best_step))
        state.restore_trained(best.trained, accelerator, model)
    evaluation = evaluate_now()
    results = {
        **{f"eval_{name}": value for name, value in evaluation.metrics.items()},
        "eval_samples": len(data.validation),
        "train_loss": progress.loss_sum / max(1, progress.step),
        "train_runtime": progress.train_seconds,
        "train_samples": len(data.train),
        "train_samples_per_second": progress.samples / max(progress.train_seconds, 1e-9),
        "trainable_params": trainable,
        "all_params": total,
        "step": progress.step,
        "best_step": progress.best_step,
        "epoch": order.samples_before(progress.step) / order.num_samples,
        "skipped_updates": progress.skipped_updates,
        "effective_batch": order.effective_batch,
        "data_fingerprint": {"train": data.train.fingerprint(), "validation": data.validation.fingerprint()},
        "base_model": base.identity(),
        **runtime.environment(accelerator),
    }
    if accelerator.is_main_process:
        report.write_evaluation(out.evaluation, evaluation, data.labels)
        handed_over = _hand_over(settings, accelerator, model, base, data, evaluation, results, out, transforms)
        output.write_json(out.results, results)
        tracker.hyperparameters(flatten(settings), evaluation.metrics)
        tracker.say(f"accuracy {evaluation.metrics['accuracy']:.4f}; wrote {handed_over}")
    tracker.close()
    accelerator.end_training()
    return results


def evaluate_only(settings: Settings) -> dict[str, float]:
    """Evaluates an adapter, or a whole model, on the validation data. Returns the metrics it prints."""
    import json
    from pathlib import Path

    from lora_dist import report, runtime
    from lora_dist.bundle import load_classifier
    from lora_dist.data import load_validation
    from lora_dist.transforms import ImageTransforms

    accelerator = runtime.launch(settings.optimization.mixed_precision)
    runtime.quiet_libraries(accelerator.is_main_process)
    assert settings.model.adapter_name_or_path is not None
    classifier = load_classifier(Path(settings.model.adapter_name_or_path))
    with accelerator.main_process_first():
        split = load_validation(settings.data, settings.run.seed, classifier.labels)
    transforms = ImageTransforms(classifier.processor)
    model = classifier.model.to(accelerator.device)
    evaluation = _evaluate(settings, accelerator, model, split, transforms, classifier.labels)
    if accelerator.is_main_process:
        directory = Path(settings.run.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        report.write_evaluation(directory / "evaluation.json", evaluation, classifier.labels)
        print(json.dumps({f"eval_{name}": value for name, value in evaluation.metrics.items()}))
    accelerator.end_training()
    return evaluation.metrics


def _evaluate(
    settings: Settings,
    accelerator: Accelerator,
    model: nn.Module,
    split: Split,
    transforms: ImageTransforms,
    labels: list[str],
) -> Evaluation:
    from lora_dist.evaluation import evaluate
    from lora_dist.loader import evaluation_loader

    loader = evaluation_loader(
        split,
        transforms,
        settings.optimization.per_device_eval_batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        settings.data,
        accelerator.device,
    )
    return evaluate(accelerator, model, loader, len(split), len(labels))


def _keep_initial_adapter(model: nn.Module, out: Output, from_scratch: bool) -> None:
    from lora_dist.adapters import mutates_base, save_adapter

    if mutates_base(model) and (from_scratch or not out.adapter_init.exists()):
        save_adapter(model, out.adapter_init)


def _announce(
    settings: Settings, accelerator: Accelerator, data: ImageData, order: Any, steps: int, trainable: int, total: int
) -> None:
    logger.info(
        "%d training and %d validation images of %d classes", len(data.train), len(data.validation), len(data.labels)
    )
    logger.info(
        "trainable params: %s || all params: %s || trainable%%: %.2f",
        f"{trainable:,}",
        f"{total:,}",
        100 * trainable / total,
    )
    logger.info(
        "%d updates of %d samples: %d a process x %d accumulated x %d processes; %s on %s",
        steps,
        order.effective_batch,
        order.per_device_batch,
        order.accumulation,
        order.world_size,
        "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
        accelerator.device,
    )


def _hand_over(
    settings: Settings,
    accelerator: Accelerator,
    model: nn.Module,
    base: Base,
    data: ImageData,
    evaluation: Evaluation,
    results: dict[str, Any],
    out: Output,
    transforms: ImageTransforms,
) -> Any:
    """Writes the adapter or model, and checks that what was written classifies as what was trained."""
    from lora_dist import adapters, bundle
    from lora_dist.card import model_card

    is_adapter = settings.model.tuning != "full"
    card = model_card(
        title=out.root.resolve().name,
        is_adapter=is_adapter,
        base_model=base.name,
        data=settings.data.dataset_name or settings.data.train_dir or "",
        labels=data.labels,
        per_class=evaluation.per_class,
        results=results,
        settings=flatten(settings),
    )
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if is_adapter:
        initial = out.adapter_init if adapters.mutates_base(bare) else None
        bundle.write_adapter(out.adapter, bare, base, card, initial)
    else:
        bundle.write_model(out.model, bare, base.processor, card)
    written = out.adapter if is_adapter else out.model
    bundle.require_same_logits(written, bare, [data.validation.image(i) for i in range(min(8, len(data.validation)))])
    return written


if __name__ == "__main__":
    main()
