"""Classifies images with what a run handed over, and merges adapters: `python -m lora_dist.predict --adapter DIR …`.

One plain process: no launcher, no `Accelerator`, no deepspeed.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lora_dist.cli import SEVERAL, argv_or, parse
from lora_dist.config import Count, Group, Names, Positive, Problem
from lora_dist.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from lora_dist.bundle import Classifier
    from lora_dist.classify import Row

logger = logging.getLogger("lora_dist.predict")

EXIT_BAD_IMAGES = 1


class ModelSource(Group):
    """Model"""

    adapter: Annotated[Names, Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Directory of an adapter, such as runs/demo/adapter, or its name on the Hub: org/name or org/name@revision. Or
    several on one base, plain or as NAME=DIRECTORY."""
    weights: Annotated[list[float], Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Blend several adapters into one: a weight for each, together 1."""
    labels: str | None = None
    """Text file of class names, one a line, for an adapter from elsewhere that has no label map."""
    model: str | None = None
    """Directory of a whole model, merged or trained with --tuning full; or its name on the Hub."""
    base_model: str | None = None
    """Where the adapter's base model is now, if not where it was."""
    trust_remote_code: bool = False
    """Run model code that comes with the model. Only for sources you trust."""


class Images(Group):
    """Images"""

    images: Annotated[Names, Field(json_schema_extra=SEVERAL)] = Field(default=[])
    """Files, folders and patterns such as 'photos/*.jpg'."""
    top_k: Count = 1
    """Classes to name for each image, most likely first."""
    output: str | None = None
    """File for the predictions; without it they are printed."""
    format: Literal["jsonl", "csv"] | None = None
    """JSON lines or CSV; by default what the name of --output says."""
    grid: str | None = None
    """Also draw some of the images, spread evenly, with their predictions into this PNG file."""
    batch_size: Count = 32
    """Images in a forward pass."""
    num_workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that decode images while the model runs."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps …"""


class Merging(Group):
    """Merging and export"""

    merge_to: str | None = None
    """Write the base with the adapter merged into it, as a plain transformers model, to this directory."""
    merge_tolerance: Positive = 1e-4
    """Refuse a merge whose logits differ by more than this, relative to the largest."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the merged weights: they are merged in fp32 and rounded last."""
    export_legacy_names: str | None = None
    """Write the adapter in the names that transformers 4 and its PEFT read, to this directory."""


class PredictSettings(Group):
    """Settings of a prediction, by group."""

    source: ModelSource = ModelSource()
    images: Images = Images()
    merging: Merging = Merging()


def contradictions(settings: PredictSettings) -> Iterator[Problem]:
    """Yields every combination of settings that cannot work."""
    source, images, merging = settings.source, settings.images, settings.merging
    if bool(source.adapter) == bool(source.model):
        yield Problem(("adapter", "model"), "give one of them")
    writes = {"merge_to": merging.merge_to, "export_legacy_names": merging.export_legacy_names}
    for name in (name for name, value in writes.items() if value):
        if source.model:
            yield Problem(("model", name), "a whole model has nothing to merge or export: give an --adapter")
        if len(source.adapter) > 1 and not source.weights:
            yield Problem(("adapter", name), "of several adapters, a blend is written: give --weights")
    for name in ("base_model", "labels", "weights"):
        if source.model and getattr(source, name):
            yield Problem(("model", name), "this belongs to an adapter: give an --adapter")
    if source.weights and source.adapter and len(source.weights) != len(source.adapter):
        yield Problem(("weights", "adapter"), f"{len(source.weights)} weights for {len(source.adapter)} adapters")
    if source.weights and not math.isclose(sum(source.weights), 1, abs_tol=1e-6):
        yield Problem(("weights",), f"they add up to {sum(source.weights):g} and not to 1")
    if merging.dtype != "fp32" and not merging.merge_to:
        yield Problem(("dtype", "merge_to"), "the type of merged weights: give a directory to merge to")
    if images.grid and len(source.adapter) > 1 and not source.weights:
        yield Problem(("grid", "adapter"), "a grid shows the predictions of one adapter")
    if not images.images and not any(writes.values()):
        yield Problem(("images", "merge_to"), "nothing to do: give images to classify, or a directory to merge to")


def named_adapters(words: Sequence[str]) -> dict[str, str]:
    """Directories of adapters, or their names on the Hub, by name: NAME=DIRECTORY, or a directory that is its own name.

    Raises:
        UserError: a name stands there twice.
    """
    named: dict[str, str] = {}
    for word in words:
        name, equals, directory = word.partition("=")
        if not equals or Path(word).exists():
            name, directory = word, word
        if name in named:
            raise UserError(f"--adapter: {name} is there twice; write NAME=DIRECTORY")
        named[name] = directory
    return named


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Merges, classifies, or both; exits with code 1 when an image could not be read."""
    settings = parse(
        PredictSettings,
        argv_or(argv),
        prog="lora_dist.predict",
        description="Classify images with an adapter or a model, or merge an adapter into its base.",
        contradictions=contradictions,
        takes_config=False,
    )
    # What follows imports torch; a mistake in the settings has been reported by now.
    from lora_dist import classify, demo, foreign, hub, logs, several

    logs.set_up_logs(is_main=True)
    source = settings.source
    names = [demo.local_path(name) for name in settings.images.images]
    files = classify.find_images(names)
    chosen = {name: hub.local_directory(place) for name, place in named_adapters(source.adapter).items()}
    labels = foreign.read_labels_file(source.labels) if source.labels else None
    rows: Iterator[Row]
    if len(chosen) > 1 and not source.weights:
        group = several.load_several(chosen, source.base_model, source.trust_remote_code, labels)
        rows = (
            row._replace(adapter=name)
            for name in group.classifiers
            for row in _rows(group.use(name), files, settings.images)
        )
    else:
        classifier = _load(source, chosen, labels)
        classifier = _write(classifier, chosen, files, settings)
        rows = _rows(classifier, files, settings.images)
    if files and not _output(rows, files, settings.images, len(chosen) > 1 and not source.weights):
        sys.exit(EXIT_BAD_IMAGES)


def _load(source: ModelSource, chosen: dict[str, Path], labels: list[str] | None) -> Classifier:
    """One classifier: a whole model, an adapter, or a blend of adapters."""
    from lora_dist import bundle, hub, several

    if len(chosen) > 1:
        return several.load_blend(chosen, source.weights, source.base_model, source.trust_remote_code, labels)
    directory = next(iter(chosen.values())) if chosen else hub.local_directory(source.model or "")
    return bundle.load_classifier(directory, source.base_model, source.trust_remote_code, labels)


def _write(classifier: Classifier, chosen: dict[str, Path], files: list[str], settings: PredictSettings) -> Classifier:
    """Exports and merges as asked, and returns what to classify with: the merged model, where there is one."""
    from lora_dist import bundle, export, merge

    source, merging = settings.source, settings.merging
    if merging.export_legacy_names:
        out = Path(merging.export_legacy_names)
        export.export_legacy_names(classifier, next(iter(chosen.values())), out, files)
        logger.info("exported to %s, in the names of transformers 4", out)
    if not merging.merge_to:
        return classifier
    out = Path(merging.merge_to)
    shares = [f"{weight:g} x {name}" for name, weight in zip(chosen, source.weights, strict=False)]
    title = " + ".join(shares or chosen)
    merged = merge.merge_to(classifier, title, out, files, merging.merge_tolerance, merging.dtype)
    logger.info("merged into %s; its logits differ by %.1e, relative to the largest", out, merged.merge)
    if merged.rounding is not None:
        logger.info("with weights rounded to %s they differ by %.1e", merging.dtype, merged.rounding)
    return bundle.load_classifier(out)


def _rows(classifier: Classifier, files: list[str], settings: Images) -> Iterator[Row]:
    from lora_dist import classify

    return classify.classify(
        classifier,
        files,
        top_k=settings.top_k,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=classify.choose_device(settings.device),
    )


def _output(rows: Iterator[Row], files: list[str], settings: Images, several: bool) -> bool:
    """Writes the rows; False where some images could not be read."""
    from lora_dist import classify

    if hasattr(signal, "SIGPIPE"):
        # `… | head` ends the command without a traceback. Not before: a lost connection to the Hub is an error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    drawn = set(classify.spread(len(files), classify.GRID)) if settings.grid else set()
    shown = []
    bad = set()
    with classify.writer(settings.output, settings.format, settings.top_k, several) as write:
        for place, row in enumerate(rows):
            write(row)
            if row.error is not None:
                bad.add(row.path)
            if place in drawn:
                shown.append(row)
    if settings.grid:
        classify.draw_grid(shown, Path(settings.grid))
    if bad:
        logger.warning("%d of %d images could not be read; their rows say why", len(bad), len(files))
    return not bad


if __name__ == "__main__":
    main()
