"""Classifies images with a model, and merges, exports or serves it: `python -m lora_dist.predict --adapter DIR …`.

One process needs no launcher. Several processes, as of `accelerate launch`, share the images.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dist.processes.failure import report_failure
from lora_dist.processes.huge_pages import move_to_huge_pages
from lora_dist.processes.lifetime import at_end, exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_launcher
from lora_dist.settings.cli import argv_or, parse
from lora_dist.settings.predict import PredictSettings, contradictions, require_shareable

if TYPE_CHECKING:
    import torch

    from lora_dist.data.pixels.conversion import Conversion
    from lora_dist.deployment.classify import Precision, Row
    from lora_dist.deployment.evaluate import Evaluation
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
    """Reads the settings and does what they say."""
    settings = parse(
        PredictSettings,
        argv_or(argv),
        prog="lora_dist.predict",
        description="Classify images with an adapter or a model; merge an adapter, export to ONNX, or serve.",
        contradictions=contradictions,
        takes_config=False,
    )
    shares = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shares:
        require_shareable(settings)
    if __name__ == "__main__":
        move_to_huge_pages()
    # Settings errors are reported before torch is imported.
    from lora_dist import extras, hub, logs
    from lora_dist.data.pixels.conversion import AS_TRANSFORMERS
    from lora_dist.data.pixels.limits import allow_pixels
    from lora_dist.deployment import classify, evaluate
    from lora_dist.deployment.export import destinations, onnx_export
    from lora_dist.deployment.inputs import Files, find_inputs
    from lora_dist.deployment.parts import MAX_IMAGES, Parts
    from lora_dist.model.adapter_set import AdapterSet
    from lora_dist.model.decision import MULTI_LABEL
    from lora_dist.processes.threads import share_cores

    logs.set_up_logs(is_main=os.environ.get("RANK", "0") == "0")
    allow_pixels(settings.images.max_image_pixels)
    if settings.serving.serve:
        extras.require("serve", "--serve", "fastapi", "uvicorn", "python_multipart")
    if settings.onnx_to_write:
        onnx_export.require_packages()
    destinations.require_destinations(settings)
    device = classify.choose_device("cpu" if settings.exporting.onnx else settings.images.device)
    if device.type == "cpu":
        share_cores()
    precision = classify.choose_precision(settings.images.precision, device)
    inputs = find_inputs(settings)
    files = list(inputs.paths) if isinstance(inputs, Files) else []
    chosen = {name: hub.local_directory(location) for name, location in settings.source.named_adapters}
    chosen = {name: _adapter_of(directory) for name, directory in chosen.items()}
    if settings.source.average or settings.source.greedy_soup:
        members = _soup(chosen, settings, device) if settings.source.greedy_soup else list(chosen)
        settings = settings.model_copy(update={"source": settings.source.averaged_over(members)})
        chosen = {name: chosen[name] for name in members}
    if settings.source.side_by_side and settings.serving.serve:
        _serve(_load_set(chosen, settings), settings, device)
        return
    rows_of: RowsOf
    if settings.source.side_by_side:
        loaded = _load_set(chosen, settings)
        rows_of, conversion = _rows_of_each(loaded, settings, device, precision, inputs), AS_TRANSFORMERS
        labels: Any = {name: one.labels for name, one in loaded.classifiers.items()}
        decisions = [one.decision for one in loaded.classifiers.values()]
    else:
        classifier = _write(_load(chosen, settings), chosen, files, settings)
        if settings.serving.serve:
            _serve(AdapterSet({settings.title: classifier}), settings, device)
        rows_of = {None: partial(_rows, classifier, settings, device, precision, inputs)}
        conversion, labels = classifier.conversion, classifier.labels
        decisions = [classifier.decision]
    if not len(inputs):
        return
    with_labels = any(decision.problem_type == MULTI_LABEL for decision in decisions)
    if with_labels:
        _require_one_class(settings)
    classes = {label for one in labels.values() for label in one} if isinstance(labels, dict) else set(labels)
    evaluation = evaluate.Evaluation(settings.images, files, set() if with_labels else classes)
    record = {"model": settings.title, "labels": labels, "precision": precision}
    logger.info("predicting on %s in %s", device, precision)
    if shares or (len(inputs) > MAX_IMAGES and _is_plain_file(settings.images.output)):
        parts = Parts(
            Path(settings.images.output or ""), list(rows_of), inputs, _plan(chosen, settings) | {"record": record}
        )
        parts.write_mine(rows_of)
        if not parts.wait_for_others():
            return
        is_whole = _output(evaluation.seen(parts.rows()), inputs, settings, conversion, record, evaluation, with_labels)
        parts.remove()
    else:
        rows = evaluation.seen(chain.from_iterable(rows_of[name](range(len(inputs))) for name in rows_of))
        shown = _with_progress(rows, len(inputs) * len(rows_of), settings)
        is_whole = _output(shown, inputs, settings, conversion, record, evaluation, with_labels)
    if not is_whole:
        sys.exit(EXIT_BAD_IMAGES)


def _adapter_of(directory: Path) -> Path:
    """Returns the directory of an adapter, or of one that is made of a checkpoint."""
    from lora_dist.model import adapter_io, checkpoint_adapter

    if not checkpoint_adapter.is_checkpoint(directory):
        adapter_io.require_adapter(directory)
        return directory
    made = Path(tempfile.mkdtemp(prefix="lora_dist-")) / directory.name
    at_end(partial(shutil.rmtree, made.parent, ignore_errors=True))
    checkpoint_adapter.write_adapter_of_checkpoint(directory, made)
    return made


def _soup(chosen: Mapping[str, Path], settings: PredictSettings, device: torch.device) -> list[str]:
    """Returns the names of the adapters that are most accurate together."""
    from lora_dist import demo
    from lora_dist.deployment import classify, soup
    from lora_dist.deployment.inputs import find_images
    from lora_dist.model import adapter_set

    source, images = settings.source, settings.images
    files = find_images([demo.local_path(source.greedy_soup or "")])
    blend = partial(
        adapter_set.load_weighted_sum,
        base_model=source.base_model,
        trust_remote_code=source.trust_remote_code,
        labels=_labels(settings),
    )
    accuracy = partial(
        soup.accuracy,
        files=files,
        batch_size=classify.choose_batch_size(images.batch_size, device),
        num_workers=images.num_workers,
        device=device,
    )
    return soup.greedy(chosen, blend, accuracy)


def _load(chosen: Mapping[str, Path], settings: PredictSettings) -> Classifier:
    """Loads an adapter, a weighted sum of adapters, a whole model, or an ONNX file."""
    from lora_dist import hub
    from lora_dist.deployment.export import onnx_model
    from lora_dist.model import adapter_set, adapters
    from lora_dist.model.classifier import load_classifier

    source = settings.source
    if not chosen and not source.model:
        return onnx_model.load_onnx(Path(settings.exporting.onnx or ""))
    labels = _labels(settings)
    if len(chosen) > 1:
        classifier = adapter_set.load_weighted_sum(
            chosen, source.weights, source.base_model, source.trust_remote_code, labels
        )
    else:
        directory = next(iter(chosen.values())) if chosen else hub.local_directory(source.model or "")
        classifier = load_classifier(directory, source.base_model, source.trust_remote_code, labels)
    if source.adapter_scale != 1:
        adapters.scale_update(classifier.model, source.adapter_scale)
    return classifier


def _labels(settings: PredictSettings) -> list[str] | None:
    from lora_dist.model import infer_metadata

    return infer_metadata.read_labels_file(settings.source.labels) if settings.source.labels else None


def _write(
    classifier: Classifier, chosen: Mapping[str, Path], files: list[str], settings: PredictSettings
) -> Classifier:
    """Writes the requested exports, and returns the classifier to use: the merged or ONNX model if one was written."""
    from lora_dist.deployment.export import merge, older_peft, onnx_export, onnx_model
    from lora_dist.model.classifier import load_classifier
    from lora_dist.storage.writable import writing

    merging, exporting, trusted = settings.merging, settings.exporting, settings.source.trust_remote_code
    if merging.export_legacy_names:
        out = Path(merging.export_legacy_names)
        card = older_peft.card_of(list(chosen.values()), settings.title, settings.source.adapter_scale != 1)
        with writing(out, "export_legacy_names"):
            older_peft.export_legacy_names(classifier, card, out, files, trusted)
        logger.info("exported to %s, with the names of transformers 4", out)
    if merging.merge_to:
        out = Path(merging.merge_to)
        tolerance, dtype = merging.merge_tolerance, merging.dtype
        with writing(out, "merge_to"):
            merged = merge.merge_to(classifier, settings.title, out, files, tolerance, dtype, trusted)
        logger.info("merged into %s; its logits differ by %.1e, relative to the largest", out, merged.merge)
        if merged.rounding is not None:
            logger.info("with weights rounded to %s they differ by %.1e", dtype, merged.rounding)
        classifier = load_classifier(out, trust_remote_code=trusted)
    if settings.onnx_to_write:
        out = Path(settings.onnx_to_write)
        with writing(out, "onnx"):
            exported = onnx_export.export(classifier, out, files, exporting.int8, exporting.fp16)
        what = ", before rounding," if exporting.int8 or exporting.fp16 else ""
        logger.info("wrote %s; its logits%s differ from PyTorch's by %.1e of the largest", out, what, exported.logits)
        if exported.fp16 is not None:
            logger.info("in fp16 they differ by %.1e", exported.fp16)
        if what:
            hint = "pass --images, best in class folders, to count the predictions that change"
            logger.info("%s", exported.cost or hint)
        classifier = onnx_model.load_onnx(out)
    return classifier


def _serve(served: AdapterSet, settings: PredictSettings, device: torch.device) -> None:
    from lora_dist.deployment import classify
    from lora_dist.deployment.serve import server, uploads
    from lora_dist.model.decision import MULTI_LABEL

    if any(one.decision.problem_type == MULTI_LABEL for one in served.classifiers.values()):
        _require_one_class(settings)
    serving = settings.serving
    limits = uploads.Limits(
        body=int(serving.max_upload_mb * 1e6), pixels=int(serving.max_megapixels * 1e6), files=serving.max_files
    )
    app = server.make_app(
        served,
        settings.title,
        limits,
        top_k=settings.images.top_k or 5,
        min_confidence=settings.images.min_confidence,
        batch_size=classify.choose_batch_size(settings.images.batch_size, device),
        device=device,
    )
    server.run(app, serving.host, serving.port)


def _rows(
    classifier: Classifier,
    settings: PredictSettings,
    device: torch.device,
    precision: Precision,
    inputs: Inputs,
    indices: Sequence[int],
) -> Iterator[Row]:
    from lora_dist.deployment import classify, explain

    batch_size = classify.choose_batch_size(settings.images.batch_size, device)
    rows = classify.classify(
        classifier,
        inputs,
        top_k=settings.images.top_k or 1,
        batch_size=batch_size,
        num_workers=settings.images.num_workers,
        device=device,
        indices=indices,
        output_type=settings.images.output_type,
        precision=precision,
    )
    if settings.images.explain is None:
        return rows
    return explain.explained(rows, inputs, indices, classifier, Path(settings.images.explain), batch_size, device)


def _load_set(chosen: Mapping[str, Path], settings: PredictSettings) -> AdapterSet:
    """Loads several adapters on a shared base."""
    from lora_dist.model import adapter_set, adapters

    source = settings.source
    loaded = adapter_set.load_adapter_set(chosen, source.base_model, source.trust_remote_code, _labels(settings))
    if source.adapter_scale != 1:
        adapters.scale_update(next(iter(loaded.classifiers.values())).model, source.adapter_scale)
    return loaded


def _rows_of_each(
    loaded: AdapterSet, settings: PredictSettings, device: torch.device, precision: Precision, inputs: Inputs
) -> RowsOf:
    """Returns what classifies images with each adapter."""

    def rows(name: str, indices: Sequence[int]) -> Iterator[Row]:
        for row in _rows(loaded.set_adapter(name), settings, device, precision, inputs, indices):
            yield row._replace(adapter=name)

    return {name: partial(rows, name) for name in loaded.classifiers}


def _plan(chosen: Mapping[str, Path], settings: PredictSettings) -> dict[str, Any]:
    """Returns what identifies the model and the rows of a prediction that is continued."""
    from lora_dist import hub
    from lora_dist.deployment.parts import digest_of

    whole = [hub.local_directory(settings.source.model)] if settings.source.model else []
    onnx = [Path(settings.exporting.onnx)] if settings.exporting.onnx else []
    return {
        "source": settings.source.model_dump(),
        "labels": _labels(settings),
        "model": [digest_of(root) for root in (*chosen.values(), *whole, *onnx)],
        "top_k": settings.images.top_k or 1,
        "output_type": settings.images.output_type,
        "max_image_pixels": settings.images.max_image_pixels,
    }


def _with_progress(rows: Iterator[Row], total: int, settings: PredictSettings) -> Iterator[Row]:
    """Yields the rows and says how far they are, if they do not go to the terminal themselves."""
    from lora_dist.deployment.progress import Progress

    with Progress(total, silent=settings.images.output is None) as progress:
        for done, row in enumerate(rows, 1):
            yield row
            progress.advance_to(done)


def _is_plain_file(output: str | None) -> bool:
    """Whether rows go to a file, rather than to the terminal, a pipe or a device."""
    return output is not None and (not Path(output).exists() or Path(output).is_file())


def _require_one_class(settings: PredictSettings) -> None:
    """Raises `UserError` for settings that a model of several labels per image cannot have."""
    from lora_dist.errors import UserError

    for name in ("min_confidence", "labels_file", "compare_to", "explain"):
        if getattr(settings.images, name) is not None:
            raise UserError(f"--{name} is for models of one class per image; this one has several labels")


def _output(
    rows: Iterator[Row],
    inputs: Inputs,
    settings: PredictSettings,
    conversion: Conversion,
    record: Mapping[str, Any],
    evaluation: Evaluation,
    with_labels: bool,
) -> bool:
    """Writes the rows, and a grid of images as `conversion` shows them; returns False if an image is unreadable.

    `evaluation` has seen the rows; it is printed where no rows are.
    """
    from lora_dist.deployment import outputs

    images = settings.images
    if hasattr(signal, "SIGPIPE"):
        # Ends `… | head` without a traceback. Not set earlier: a lost connection to the Hub is an error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    drawn = set(outputs.spread(len(inputs), outputs.GRID_IMAGES)) if images.grid else set()
    shown = []
    bad = 0
    side_by_side = settings.source.side_by_side
    with outputs.writer(
        images.output, images.format, images.top_k or 1, side_by_side, images.output_type, record, with_labels
    ) as write:
        for index, row in enumerate(row.known_from(images.min_confidence) for row in rows):
            write(row)
            # The adapters of a set have the same unreadable images.
            bad += row.error is not None and index < len(inputs)
            if index in drawn:
                shown.append((row, inputs.read([index])[0].source))
    if images.compare_to and images.grid:
        if not evaluation.draw_disagreements(Path(images.grid), conversion):
            logger.warning("--grid: not drawn, because no prediction differs from --compare_to")
    elif images.grid:
        outputs.draw_grid(shown, Path(images.grid), conversion)
    for line in evaluation.lines():
        print(line, file=sys.stdout if images.output else sys.stderr)
    if images.output:
        logger.info("wrote %s", images.output)
    if bad:
        logger.warning("%d of %d images could not be read; their rows have the errors", bad, len(inputs))
    return not bad


if __name__ == "__main__":
    run_command(main)
