"""Classifies images with what a run handed over, and merges adapters: `python -m lora_dist.predict --adapter DIR …`.

One plain process: no launcher, no `Accelerator`, no deepspeed.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lora_dist.cli import SEVERAL, argv_or, parse
from lora_dist.config import Count, Group, Names, Positive, Problem
from lora_dist.errors import exit_on_user_error

if TYPE_CHECKING:
    from lora_dist.bundle import Classifier

logger = logging.getLogger("lora_dist.predict")

EXIT_BAD_IMAGES = 1


class ModelSource(Group):
    """Model"""

    adapter: str | None = None
    """Directory of an adapter, such as runs/demo/adapter; or its name on the Hub: org/name or org/name@revision."""
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
    """Merging"""

    merge_to: str | None = None
    """Write the base with the adapter merged into it, as a plain transformers model, to this directory."""
    merge_tolerance: Positive = 1e-4
    """Refuse a merge whose logits differ by more than this, relative to the largest."""


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
    if source.model and merging.merge_to:
        yield Problem(("model", "merge_to"), "a whole model has nothing to merge: give an --adapter")
    if source.model and source.base_model:
        yield Problem(("model", "base_model"), "a whole model has no base: give an --adapter")
    if not images.images and not merging.merge_to:
        yield Problem(("images", "merge_to"), "nothing to do: give images to classify, or a directory to merge to")


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
    from lora_dist import bundle, classify, demo, hub, logs, merge

    logs.set_up_logs(is_main=True)
    names = [demo.local_path(name) for name in settings.images.images]
    files = classify.find_images(names)
    directory = hub.local_directory(settings.source.adapter or settings.source.model or "")
    classifier = bundle.load_classifier(directory, settings.source.base_model, settings.source.trust_remote_code)
    if settings.merging.merge_to:
        out = Path(settings.merging.merge_to)
        difference = merge.merge_to(classifier, directory, out, files, settings.merging.merge_tolerance)
        logger.info("merged into %s; its logits differ by %.1e, relative to the largest", out, difference)
        classifier = bundle.load_classifier(out)
    if files and not _classify(classifier, files, settings.images):
        sys.exit(EXIT_BAD_IMAGES)


def _classify(classifier: Classifier, files: list[str], settings: Images) -> bool:
    """Writes a row for each file; False where some could not be read."""
    from lora_dist import classify

    if hasattr(signal, "SIGPIPE"):
        # `… | head` ends the command without a traceback. Not before: a lost connection to the Hub is an error.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    rows = classify.classify(
        classifier,
        files,
        top_k=settings.top_k,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        device=classify.choose_device(settings.device),
    )
    drawn = set(classify.spread(len(files), classify.GRID)) if settings.grid else set()
    shown = []
    bad = 0
    with classify.writer(settings.output, settings.format, settings.top_k) as write:
        for place, row in enumerate(rows):
            write(row)
            bad += row.error is not None
            if place in drawn:
                shown.append(row)
    if settings.grid:
        classify.draw_grid(shown, Path(settings.grid))
    if bad:
        logger.warning("%d of %d images could not be read; their rows say why", bad, len(files))
    return not bad


if __name__ == "__main__":
    main()
