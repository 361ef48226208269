"""A run as people see it: what is about to run, the inputs and the worst images as pictures, the numbers as JSON."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lora_dist.data.batch import TrainImages
from lora_dist.data.loader import unreadable
from lora_dist.data.pixels.conversion import Conversion
from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sources.load import ImageData
from lora_dist.data.sources.split import Split
from lora_dist.figures import confusion_picture, grid, to_images
from lora_dist.training.evaluation import Evaluation
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving.output import write_json
from lora_dist.training.schedule import Schedule

logger = logging.getLogger(__name__)

WORST = 24
INPUTS = 24


def announce(
    data: ImageData, order: BatchPlan, schedule: Schedule, parameters: tuple[int, int], accelerator: Accelerator
) -> None:
    """Says what is about to run: the data, what trains, and the size of an update."""
    trainable, total = parameters
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    logger.info(
        f"{len(data.train):,} training and {len(data.validation):,} validation images of {len(data.labels)} classes\n"
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.2f}\n"
        f"{schedule.total_steps:,} updates of {order.effective_batch} samples: {order.per_device_batch} a process x "
        f"{order.accumulation} accumulated x {order.world_size} processes; {precision} on {accelerator.device}"
    )
    if order.effective_batch > order.num_samples:
        logger.warning(
            "an update is an epoch: it takes all %d images, which are fewer than the %d of an update. A smaller "
            "--per_device_train_batch_size or --gradient_accumulation_steps gives more updates",
            order.num_samples,
            order.effective_batch,
        )


def show_evaluation(
    tracker: Tracker, evaluation: Evaluation, step: int, split: Split, labels: Sequence[str], conversion: Conversion
) -> None:
    """Adds the confusion matrix and the worst-classified images to TensorBoard.

    A picture that cannot be made is a missing picture and a warning: no reason to stop a run.
    """
    if not tracker.enabled:
        return
    try:
        _show_evaluation(tracker, evaluation, step, split, labels, conversion)
    except Exception as error:
        logger.warning("no pictures of the evaluation after update %d: %s: %s", step, type(error).__name__, error)


def _show_evaluation(
    tracker: Tracker, evaluation: Evaluation, step: int, split: Split, labels: Sequence[str], conversion: Conversion
) -> None:
    tracker.picture("eval/confusion_matrix", confusion_picture(evaluation.confusion, labels), step)
    worst = evaluation.worst(WORST)
    captions = [
        f"is {labels[split.labels[index]]}\n"
        f"said {labels[evaluation.predictions[index]]} {evaluation.confidences[index]:.0%}"
        for index in worst
    ]
    tracker.picture("eval/worst", grid([split.image(index, conversion) for index in worst], captions), step)


def show_inputs(tracker: Tracker, images: TrainImages, order: BatchPlan, step: int, labels: Sequence[str]) -> None:
    """Adds a grid of the next training inputs, as augmented, to TensorBoard.

    Raises:
        ProcessError: names one that cannot be read.
    """
    if not tracker.enabled:
        return
    samples = next(order.micro_batches(step))[:INPUTS]
    try:
        batch = images.batch(samples)
    except UnreadableImageError as error:
        raise unreadable(error) from error
    images.close()
    tracker.picture(
        "train/inputs", grid(to_images(batch.pixel_values), [labels[label] for label in batch.labels.tolist()]), step
    )


def write_evaluation(path: Path, evaluation: Evaluation, labels: Sequence[str]) -> None:
    """Writes the metrics, the report by class and the confusion matrix."""
    content: dict[str, Any] = {
        "metrics": evaluation.metrics,
        "per_class": dict(zip(labels, evaluation.per_class, strict=True)),
        "confusion_matrix": {"labels": list(labels), "rows_true_columns_predicted": evaluation.confusion.tolist()},
    }
    write_json(path, content)
