"""Reports on a run: the plan as text, the inputs and the worst images as pictures, the metrics as JSON."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lora_dist.data.loader import unreadable
from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sources.load import ImageData
from lora_dist.deployment.explain import overlays
from lora_dist.figures import grid, to_images
from lora_dist.metrics.intervals import NAMES, Measured
from lora_dist.metrics.slices import slice_rows
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.problems.problem import ProblemType, worst_samples
from lora_dist.training.problems.problem_types import EvaluationResult
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.output import write_json
from lora_dist.training.schedule import Schedule

logger = logging.getLogger(__name__)

WORST = 24
INPUTS = 24
EXPLAINED_AT_ONCE = 4
"""Images of a forward and backward pass for heat maps, on the CPU."""


def announce(
    data: ImageData,
    plan: BatchPlan,
    schedule: Schedule,
    parameters: tuple[int, int],
    accelerator: Accelerator,
    precision: str,
) -> None:
    """Logs the plan of a run: the data, the trained parameters, and the size of an update."""
    trainable, total = parameters
    precision = "fp32" if precision == "no" else precision
    word = "labels" if data.train.label_shape else "classes"
    logger.info(
        f"{len(data.train):,} training and {len(data.validation):,} validation images of {len(data.labels)} {word}"
        f"{f'; fold {data.fold}' if data.fold else ''}\n"
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.2f}\n"
        f"{schedule.total_steps:,} updates of {min(plan.effective_batch, plan.num_samples)} samples: at most "
        f"{plan.per_device_batch} per process x {plan.accumulation} accumulated x {processes_text(plan.world_size)}; "
        f"{precision} on {accelerator.device}"
    )
    if plan.effective_batch > plan.num_samples:
        logger.warning(
            "each epoch is one update: the %d training images are fewer than the %d samples of an update. A smaller "
            "--per_device_train_batch_size or --gradient_accumulation_steps gives more updates",
            plan.num_samples,
            plan.effective_batch,
        )


def processes_text(count: int) -> str:
    """Returns `1 process` or `2 processes`."""
    return f"{count} process{'es' if count > 1 else ''}"


def show_evaluation(tracker: Tracker, evaluator: Evaluator, evaluation: EvaluationResult, step: int) -> None:
    """Adds the pictures of the problem type, such as a confusion matrix, and the worst images to TensorBoard."""
    if not tracker.enabled:
        return
    problem, split, labels = evaluator.problem, evaluator.split, evaluator.labels
    with _optional(f"no pictures of the evaluation after update {step}"):
        for name, picture in problem.pictures(evaluation, labels).items():
            tracker.picture(f"eval/{name}", picture, step)
        worst, conversion = worst_samples(evaluation.losses, WORST), evaluator.transforms.conversion
        captions = problem.answers(evaluation, split, worst, labels)
        tracker.picture("eval/worst", grid([split.image(index, conversion) for index in worst], captions), step)


@contextmanager
def _optional(missing: str) -> Iterator[None]:
    """Logs an exception of the block as a warning: a run must not stop for a missing picture."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s: %s", missing, type(error).__name__, error)


def headline_lines(evaluation: EvaluationResult) -> list[str]:
    """The metrics that have intervals, with these, as lines of text."""
    told = {name: evaluation.metrics[name] for name in NAMES if name in evaluation.metrics}
    return _lines(Measured(told, dict(evaluation.intervals)).texts())


def slice_lines(slices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """Yields lines for each value of each column: its images, and below these its metrics."""
    for row in slice_rows(slices):
        yield f"{row.column} {row.value}: {row.images}"
        yield from (f"  {line}" for line in _lines([f"{name} {text}" for name, text in row.metrics.items()]))


def _lines(metrics: Sequence[str]) -> list[str]:
    """Two metrics with their intervals to a line, which has about 100 characters then."""
    return [", ".join(metrics[start : start + 2]) for start in range(0, len(metrics), 2)]


def measured(evaluation: EvaluationResult) -> dict[str, Any]:
    """The metrics, their intervals (such as `accuracy_interval`) and, if there are any, `slices`, as JSON values."""
    intervals = {f"{name}_interval": list(interval) for name, interval in evaluation.intervals.items()}
    slices = {"slices": evaluation.slices} if evaluation.slices else {}
    return {**evaluation.metrics, **intervals, **slices}


def warn_of_chance_level(problem: ProblemType, evaluation: EvaluationResult) -> None:
    """Warns if the model is no better than one that has learned nothing."""
    reached, (chance, words) = evaluation.metrics[problem.headline], problem.chance_level(evaluation)
    if reached <= chance:
        logger.warning(
            "%s %.4f is not above %s, %.4f: the model has learned little. Try another --learning_rate, or more updates",
            problem.headline,
            reached,
            words,
            chance,
        )


def explain_worst(
    tracker: Tracker, evaluator: Evaluator, model: nn.Module, evaluation: EvaluationResult, step: int
) -> None:
    """Adds heat maps of the worst-classified images to TensorBoard. No engine has wrapped the model."""
    split, transforms, worst = evaluator.split, evaluator.transforms, worst_samples(evaluation.losses, WORST)
    if not tracker.enabled or not worst:
        return
    with _optional("no heat maps of the worst images"):
        model.eval()
        shown = []
        for start in range(0, len(worst), EXPLAINED_AT_ONCE):
            images = [split.image(index, transforms.conversion) for index in worst[start : start + EXPLAINED_AT_ONCE]]
            shown += overlays(model, transforms.batch(images))
        captions = evaluator.problem.answers(evaluation, split, worst, evaluator.labels)
        tracker.picture("eval/worst_explained", grid(shown, captions), step)


def show_inputs(run: TrainingRun) -> None:
    """Adds a grid of the training inputs of the next update, as augmented, to TensorBoard.

    Raises:
        ProcessError: names an image that cannot be read.
    """
    if not run.tracker.enabled:
        return
    step = run.progress.step
    samples = next(run.plan.micro_batches(step))[:INPUTS]
    try:
        batch = run.images.batch(samples)
    except UnreadableImageError as error:
        raise unreadable(error) from error
    run.images.close()
    captions = [run.evaluator.problem.caption(label, run.evaluator.labels) for label in batch.labels.numpy()]
    run.tracker.picture("train/inputs", grid(to_images(batch.pixel_values), captions), step)


def write_evaluation(path: Path, problem: ProblemType, evaluation: EvaluationResult, labels: Sequence[str]) -> None:
    """Writes the metrics, the report by class, and the details of the problem type, such as a confusion matrix."""
    content: dict[str, Any] = {
        "metrics": measured(evaluation),
        "per_class": dict(zip(labels, evaluation.per_class, strict=True)),
        **problem.details(evaluation, labels),
    }
    write_json(path, content)
