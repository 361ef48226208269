"""Classifies images with a model, and merges, exports or serves it: `python -m lora_dist.predict --adapter DIR …`.

One process needs no launcher. Several processes, as of `accelerate launch`, share the images.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dist.deployment.export import destinations
from lora_dist.errors import UserError
from lora_dist.processes.failure import report_failure
from lora_dist.processes.huge_pages import move_to_huge_pages
from lora_dist.processes.launch_summary import write_reason
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_launcher
from lora_dist.settings.cli import argv_or, parse
from lora_dist.settings.predict import PredictSettings
from lora_dist.settings.predict_contradictions import contradictions, missing_paths, require_shareable

if TYPE_CHECKING:
    import torch

    from lora_dist.data.pixels.conversion import Conversion
    from lora_dist.deployment.classify import Inference, Row
    from lora_dist.deployment.evaluate import Evaluation, Reference
    from lora_dist.deployment.inputs import Inputs
    from lora_dist.deployment.parts import RowsOf
    from lora_dist.model.adapter_set import AdapterSet
    from lora_dist.model.classifier import Classifier

logger = logging.getLogger("lora_dist.predict")

EXIT_BAD_IMAGES = 1


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Merges, exports, classifies or serves; exits with code 1 if an image cannot be read."""
    end_with_launcher()
    with report_failure():
        predict(argv)


def predict(argv: list[str] | None) -> None:
    """Reads the settings, and merges, exports, serves or classifies as they say."""
    settings = parse(
        PredictSettings,
        argv_or(argv),
        prog="lora_dist.predict",
        description="Classify images with an adapter or a model; merge an adapter, export to ONNX, or serve.",
        contradictions=lambda read: chain(contradictions(read), missing_paths(read)),
        takes_config=False,
    )
    if _is_shared():
        require_shareable(settings)
    if __name__ == "__main__":
        move_to_huge_pages()
    # Settings errors are reported before torch is imported, and so are outputs that cannot be written.
    destinations.require_destinations(settings)
    from lora_dist import extras, logs
    from lora_dist.data.pixels.limits import allow_pixels
    from lora_dist.deployment import classify, evaluate, loading
    from lora_dist.deployment.export import exports, onnx_export
    from lora_dist.deployment.inputs import files_of, find_inputs
    from lora_dist.model.adapter_set import AdapterSet
    from lora_dist.processes.threads import share_cores

    logs.set_up_logs(is_main=os.environ.get("RANK", "0") == "0")
    allow_pixels(settings.images.max_image_pixels)
    if settings.serving.serve:
        extras.require("serve", "--serve", "fastapi", "uvicorn", "python_multipart")
    if settings.onnx_to_write:
        onnx_export.require_packages()
    device = classify.choose_device("cpu" if settings.exporting.onnx else settings.images.device)
    if device.type == "cpu":
        share_cores()
    inference = classify.Inference(
        device,
        settings.images.batch_size,
        settings.images.num_workers,
        classify.choose_precision(settings.images.precision, device),
    )
    inputs = find_inputs(settings)
    other = evaluate.read_other_predictions(settings.images)
    settings, adapters = loading.choose_adapters(settings, device)
    models = loading.load(settings, adapters)
    several = _is_multi_label(models)
    if several:
        _require_single_label(settings)
    reference = evaluate.Reference(evaluate.read_labels(settings, several), other)
    models = AdapterSet(
        {name: exports.write(one, adapters, files_of(inputs), settings) for name, one in models.classifiers.items()}
    )
    if settings.serving.serve:
        _serve(models, settings, device)
        return
    if not len(inputs):
        return
    if not _classify(models, adapters, inputs, reference, settings, inference):
        sys.exit(EXIT_BAD_IMAGES)


def _classify(
    models: AdapterSet,
    adapters: Mapping[str, Path],
    inputs: Inputs,
    reference: Reference,
    settings: PredictSettings,
    inference: Inference,
) -> bool:
    """Classifies and evaluates the images of this process; returns False if an image of the output cannot be read."""
    from lora_dist.deployment import outputs
    from lora_dist.deployment.evaluate import Evaluation
    from lora_dist.deployment.inputs import files_of
    from lora_dist.deployment.parts import MAX_IMAGES, Parts

    classifiers = models.classifiers
    labels = {name: one.labels for name, one in classifiers.items()}
    several = _is_multi_label(models)
    classes = set(chain.from_iterable(labels.values()))
    if several:
        outputs.require_separable(classes, settings.images.output, settings.images.format)
    evaluation = Evaluation(settings.images, reference, files_of(inputs), classes, several)
    if evaluation.is_needed and len({one.decision.problem_type for one in classifiers.values()}) > 1:
        raise UserError("adapters of one class and of several labels per image cannot be evaluated together")
    shown = min(settings.images.top_k or 1, max(map(len, labels.values())))
    # The mAP needs the scores of all labels.
    top_k = len(classes) if several and evaluation.is_needed else shown
    # An ONNX file has a precision of its own.
    computed_in = getattr(next(iter(classifiers.values())).model, "precision", inference.precision)
    record = {
        "model": settings.title,
        "labels": labels if settings.source.side_by_side else next(iter(labels.values())),
        "precision": computed_in,
    }
    write = partial(
        _output,
        inputs=inputs,
        settings=settings,
        conversion=next(iter(classifiers.values())).conversion,
        record=record,
        evaluation=evaluation,
        several=several,
        top_k=shown,
    )
    rows_of = _rows_of(models, settings, inference, inputs, top_k)
    # No log line stands between rows on the terminal, unless the precision is reduced.
    if settings.images.output or computed_in != "fp32":
        logger.info("predicting on %s in %s", inference.device, computed_in)
    if _is_shared() or (len(inputs) > MAX_IMAGES and destinations.is_plain_file(settings.images.output)):
        plan = _identity(adapters, settings) | {"record": record, "top_k": top_k}
        parts = Parts(Path(settings.images.output or ""), list(rows_of), inputs, plan)
        with parts.kept():
            if not parts.write(rows_of):
                return True
            all_readable = write(evaluation.seen(parts.rows()))
        parts.remove()
        return all_readable
    rows = evaluation.seen(chain.from_iterable(rows_of[name](range(len(inputs))) for name in rows_of))
    return write(_with_progress(rows, len(inputs) * len(rows_of), settings))


def _is_shared() -> bool:
    """Whether several processes share the images."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_multi_label(models: AdapterSet) -> bool:
    """Whether a model has several labels per image."""
    from lora_dist.model.decision import MULTI_LABEL

    return any(one.decision.problem_type == MULTI_LABEL for one in models.classifiers.values())


def _serve(served: AdapterSet, settings: PredictSettings, device: torch.device) -> None:
    from lora_dist.deployment.serve import server
    from lora_dist.deployment.serve.request_limits import Limits

    serving = settings.serving
    limits = Limits(
        body=int(serving.max_upload_mb * 1e6), pixels=int(serving.max_megapixels * 1e6), files=serving.max_files
    )
    app = server.make_app(
        served,
        settings.title,
        limits,
        top_k=settings.images.top_k or 5,
        min_confidence=settings.images.min_confidence,
        batch_size=settings.images.batch_size,
        device=device,
    )
    server.run(app, serving.host, serving.port)


def _rows(
    classifier: Classifier,
    settings: PredictSettings,
    inference: Inference,
    inputs: Inputs,
    top_k: int,
    indices: Sequence[int],
) -> Iterator[Row]:
    from lora_dist.deployment import classify, explain

    rows = classify.classify(
        classifier, inputs, inference, top_k=top_k, indices=indices, output_type=settings.images.output_type
    )
    if settings.images.explain is None:
        return rows
    directory = Path(settings.images.explain)
    return explain.explained(rows, inputs, indices, classifier, directory, inference.batch_size, inference.device)


def _rows_of(
    models: AdapterSet,
    settings: PredictSettings,
    inference: Inference,
    inputs: Inputs,
    top_k: int,
) -> RowsOf:
    """Returns functions that classify images with one model each: by its name, or under None if there is only one."""

    def rows(name: str, adapter: str | None, indices: Sequence[int]) -> Iterator[Row]:
        for row in _rows(models.set_adapter(name), settings, inference, inputs, top_k, indices):
            yield row._replace(adapter=adapter)

    adapters = {name: name if settings.source.side_by_side else None for name in models.classifiers}
    return {adapter: partial(rows, name, adapter) for name, adapter in adapters.items()}


def _identity(adapters: Mapping[str, Path], settings: PredictSettings) -> dict[str, Any]:
    """Returns the settings and files on which rows depend: a prediction is continued only if they are the same."""
    from lora_dist import hub
    from lora_dist.deployment.parts import digest_of

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
    from lora_dist.deployment.progress import Progress

    with Progress(total, silent=settings.images.output is None) as progress:
        for done, row in enumerate(rows, 1):
            yield row
            progress.advance_to(done)


def _require_single_label(settings: PredictSettings) -> None:
    """Raises `UserError` for settings that a model of several labels per image cannot have."""
    if settings.images.min_confidence is not None:
        raise UserError(
            "--min_confidence is for models of one class per image. This one has several labels, each with a threshold "
            "of its own: edit thresholds.json of the adapter or model"
        )


def _output(
    rows: Iterator[Row],
    inputs: Inputs,
    settings: PredictSettings,
    conversion: Conversion,
    record: Mapping[str, Any],
    evaluation: Evaluation,
    several: bool,
    top_k: int,
) -> bool:
    """Writes the rows and a grid of images, and prints the evaluation; returns False if an image is unreadable.

    Args:
        rows: of all images; `evaluation` sees them on their way.
        inputs: the images.
        settings: name the outputs.
        conversion: how the images of the grid become RGB.
        record: of the model, for a parquet file.
        evaluation: printed to the standard output, or to the error stream if the rows are printed.
        several: whether rows have labels instead of one class.
        top_k: number of classes in a row.
    """
    from lora_dist.deployment import outputs

    images = settings.images
    if hasattr(signal, "SIGPIPE"):
        # Ends `… | head` without a traceback. Not set earlier: a lost connection to the Hub is an error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    shows_disagreements = images.compare_to is not None
    drawn: set[int] = set()
    if images.grid and not shows_disagreements:
        drawn.update(outputs.spread(len(inputs), outputs.GRID_IMAGES))
    in_grid = []
    bad = 0
    side_by_side = settings.source.side_by_side
    with outputs.writer(
        images.output, images.format, top_k, side_by_side, images.output_type, record, several
    ) as write:
        for index, row in enumerate(row.known_from(images.min_confidence) for row in rows):
            write(row._replace(top_k=row.top_k[:top_k]))
            # The adapters of a set have the same unreadable images.
            bad += row.error is not None and index < len(inputs)
            if index in drawn:
                in_grid.append((row, inputs.read([index])[0].source))
    if images.grid and not shows_disagreements:
        outputs.draw_grid(in_grid, Path(images.grid), conversion)
    elif images.grid and evaluation.disagreements:
        pairs = [(row, row.path) for row in evaluation.disagreements]
        outputs.draw_grid(pairs, Path(images.grid), conversion, evaluation.caption)
    elif images.grid:
        logger.warning("--grid: not drawn, because no prediction differs from --compare_to")
    for line in evaluation.lines():
        print(line, file=sys.stdout if images.output else sys.stderr)
    if images.output:
        logger.info("wrote %s", images.output)
    if bad:
        unread = f"{bad:,} of {len(inputs):,} images could not be read; their rows have the errors"
        write_reason(unread)
        logger.warning(unread)
    return not bad


if __name__ == "__main__":
    run_command(main)
