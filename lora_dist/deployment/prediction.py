"""Classifies all images with the models, writes the rows and a grid of images, and prints the evaluation."""

import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lora_dist import hub
from lora_dist.deployment import classify, destinations, explain, outputs
from lora_dist.deployment.classify import Inference, Row
from lora_dist.deployment.evaluate import Evaluation, Reference
from lora_dist.deployment.inputs import Inputs, files_of
from lora_dist.deployment.parts import MAX_IMAGES, Parts, RowsOf, digest_of
from lora_dist.deployment.progress import Progress
from lora_dist.errors import UserError
from lora_dist.model.trained.adapter_set import AdapterSet
from lora_dist.processes.launch_summary import write_reason
from lora_dist.settings.predict import PredictSettings

logger = logging.getLogger(__name__)


def classify_and_write(
    models: AdapterSet,
    adapters: Mapping[str, Path],
    inputs: Inputs,
    reference: Reference,
    settings: PredictSettings,
    inference: Inference,
    is_shared: bool,
) -> bool:
    """Classifies the images, or the share of this process, and writes and evaluates the output.

    Args:
        models: the classifiers, by name.
        adapters: directories of those that are adapters, by the same names.
        inputs: the images.
        reference: labels and predictions to compare with.
        settings: of the command.
        inference: device, precision and batch size.
        is_shared: whether several processes share the images. The first one writes the output.

    Returns:
        Whether all images of the output could be read; True on processes that do not write it.

    Raises:
        UserError: the settings do not fit the models, or the output cannot be written.
    """
    first = models.first
    classes = set(chain.from_iterable(one.labels for one in models.classifiers.values()))
    if models.multi_label:
        outputs.require_separable(classes, settings.images.output, settings.images.format)
    evaluation = Evaluation(settings.images, reference, files_of(inputs), classes, models.multi_label)
    if evaluation.is_needed and len({one.decision.problem_type for one in models.classifiers.values()}) > 1:
        raise UserError("adapters of one class and of several labels per image cannot be evaluated together")
    shown = min(settings.images.top_k or 1, max(len(one.labels) for one in models.classifiers.values()))
    # The mAP needs the scores of all labels.
    top_k = len(classes) if models.multi_label and evaluation.is_needed else shown
    # An ONNX file has a precision of its own.
    precision = getattr(first.model, "precision", inference.precision)
    labels = {name: one.labels for name, one in models.classifiers.items()}
    record = {
        "model": settings.title,
        "labels": labels if settings.source.side_by_side else first.labels,
        "precision": precision,
    }
    write = partial(
        _write, inputs=inputs, models=models, settings=settings, record=record, evaluation=evaluation, top_k=shown
    )
    rows_of = _rows_of(models, settings, inference, inputs, top_k)
    # No log line stands between rows on the terminal, unless the precision is reduced.
    if settings.images.output or precision != "fp32":
        logger.info("predicting on %s in %s", inference.device, precision)
    if is_shared or (len(inputs) > MAX_IMAGES and destinations.is_plain_file(settings.images.output)):
        plan = _identity(adapters, settings) | {"record": record, "top_k": top_k}
        parts = Parts(Path(settings.images.output or ""), list(rows_of), inputs, plan)
        with parts.kept_rows_reported():
            parts.write(rows_of)
            if not parts.is_first:
                return True
            all_readable = write(parts.rows())
        parts.remove()
        return all_readable
    rows = chain.from_iterable(rows_of[name](range(len(inputs))) for name in rows_of)
    return write(_with_progress(rows, len(inputs) * len(rows_of), settings))


def _rows_of(models: AdapterSet, settings: PredictSettings, inference: Inference, inputs: Inputs, top_k: int) -> RowsOf:
    """Returns functions that classify images with one model each: by its name, or under None if there is only one."""
    images = settings.images

    def rows(name: str, adapter: str | None, indices: Sequence[int]) -> Iterator[Row]:
        classifier = models.set_adapter(name)
        found = classify.classify(
            classifier, inputs, inference, top_k=top_k, indices=indices, output_type=images.output_type
        )
        if images.explain is not None:
            directory, batch_size, device = Path(images.explain), inference.batch_size, inference.device
            found = explain.explained(found, inputs, indices, classifier, directory, batch_size, device)
        return (row._replace(adapter=adapter) for row in found)

    adapters = {name: name if settings.source.side_by_side else None for name in models.classifiers}
    return {adapter: partial(rows, name, adapter) for name, adapter in adapters.items()}


def _identity(adapters: Mapping[str, Path], settings: PredictSettings) -> dict[str, Any]:
    """Returns the settings and files on which rows depend: a prediction is continued only if they are the same."""
    whole = [hub.local_directory(settings.source.model)] if settings.source.model else []
    onnx = [Path(settings.exporting.onnx)] if settings.exporting.onnx else []
    return {
        "source": settings.source.model_dump(),
        "model": [digest_of(root) for root in (*adapters.values(), *whole, *onnx)],
        "output_type": settings.images.output_type,
        "explain": settings.images.explain,
        "max_image_pixels": settings.images.max_image_pixels,
    }


def _with_progress(rows: Iterator[Row], total: int, settings: PredictSettings) -> Iterator[Row]:
    """Yields the rows and reports how many are done, if the rows themselves are not printed."""
    with Progress(total, silent=settings.images.output is None) as progress:
        for done, row in enumerate(rows, 1):
            yield row
            progress.advance_to(done)


def _write(
    rows: Iterable[Row],
    inputs: Inputs,
    models: AdapterSet,
    settings: PredictSettings,
    record: Mapping[str, Any],
    evaluation: Evaluation,
    top_k: int,
) -> bool:
    """Writes the rows and a grid of images, and prints the evaluation; returns whether all images could be read.

    Args:
        rows: of all images, adapter by adapter.
        inputs: the images.
        models: their classifiers.
        settings: name the outputs.
        record: of the models, for a parquet file.
        evaluation: printed to the standard output, or to the error stream if the rows are printed.
        top_k: number of classes in a row.
    """
    images = settings.images
    if hasattr(signal, "SIGPIPE"):
        # Ends `… | head` without a traceback. Not set earlier: a lost connection to the Hub is an error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    drawn = set(outputs.spread(len(inputs), outputs.GRID_IMAGES)) if images.grid and not images.compare_to else set()
    in_grid, unreadable = [], 0
    with outputs.writer(
        images.output,
        images.format,
        top_k,
        settings.source.side_by_side,
        images.output_type,
        record,
        models.multi_label,
    ) as write_row:
        for index, one in enumerate(evaluation.collect(rows)):
            row = one.known_from(images.min_confidence)
            write_row(row._replace(top_k=row.top_k[:top_k]))
            # All adapters have the same unreadable images: those of the first are counted.
            unreadable += row.error is not None and index < len(inputs)
            if index in drawn:
                in_grid.append((row, inputs.read([index])[0].source))
    if images.grid:
        conversion = models.first.conversion
        if not images.compare_to:
            outputs.draw_grid(in_grid, Path(images.grid), conversion)
        elif evaluation.disagreements:
            pairs = [(row, row.path) for row in evaluation.disagreements]
            outputs.draw_grid(pairs, Path(images.grid), conversion, evaluation.caption)
        else:
            logger.warning("--grid: not drawn, because no prediction differs from --compare_to")
    for line in evaluation.lines():
        print(line, file=sys.stdout if images.output else sys.stderr)
    if images.output:
        logger.info("wrote %s", images.output)
    if unreadable:
        message = f"{unreadable:,} of {len(inputs):,} images could not be read; their rows have the errors"
        write_reason(message)
        logger.warning(message)
    return not unreadable
