"""Settings of an audit: names, types, defaults, help texts and contradictions."""

import os
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from lora_dist.settings.fields import (
    MULTI_LABEL,
    Color,
    Contradiction,
    Count,
    Group,
    MaxPixels,
    NonNegative,
    PixelRange,
    ProblemType,
    impossible_output,
    inside_data,
    missing_paths,
    same_folders,
    several,
)

Ratio = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class AuditData(Group):
    """Data"""

    train_dir: str | None = None
    """Folder of training images with one sub-folder per class."""
    problem_type: ProblemType = "single_label_classification"
    """Whether each image has one class, or any number of labels in --labels_file, as for lora_dist.train."""
    labels_file: str | None = None
    """Text file with the labels of the images in --train_dir, as for lora_dist.train. Its test images are audited as
    validation images."""
    image_column_name: str | None = None
    """Column of paths in --labels_file."""
    label_column_name: str | None = None
    """Column of labels in --labels_file, or its columns of 0 and 1, such as cat,dog,bird."""
    split_column_name: str | None = None
    """Column of --labels_file with train, validation or test."""
    group_column_name: str | None = None
    """Column of groups in --labels_file, such as patients. A group in several splits is an error."""
    validation_dir: str | None = None
    """Folder of validation images with one sub-folder per class, to find images that are also in training."""
    exclude: str | None = None
    """Text file with the paths of images and folders to leave out, one per line, e.g. an earlier quarantine.txt."""
    predictions: str | None = None
    """File of out-of-fold predictions that lora_dist.folds writes, or the directory of a run with --fold, to find
    labels that are likely wrong."""
    transparent_background: Color = "white"
    """Color behind transparent images, as for lora_dist.train: white, black, R,G,B or ignore."""
    pixel_range: PixelRange | None = Field(default=None, json_schema_extra=several("X"))
    """LOW HIGH: values that become 0 and 255 in images of more than 8 bits, as for lora_dist.train. Default: the range
    of 64 training images."""
    max_image_pixels: MaxPixels | None = None
    """Largest image to decode, in pixels, as for lora_dist.train. Default: Pillow's limit, 178,956,970."""


class Checks(Group):
    """Checks"""

    max_aspect_ratio: Ratio = 5.0
    """Report images whose longer side exceeds this multiple of the shorter side."""
    max_imbalance: Ratio = 10.0
    """Report if the largest class has more than this multiple of the training images of the smallest class."""
    min_class_images: Count = 10
    """Report classes with fewer training images."""
    near_distance: NonNegative = 0.12
    """Largest difference between near duplicates, relative to their contrast. 0 reports only exact duplicates."""


class AuditRun(Group):
    """Run"""

    output_dir: str = "audit"
    """Directory for report.html, report.json and quarantine.txt, and likely_wrong.txt with --predictions. Existing ones
    are replaced."""
    num_workers: Count | None = None
    """Processes that read images. Default: one per core."""


class AuditSettings(Group):
    """All settings of an audit, by group."""

    data: AuditData = AuditData()
    checks: Checks = Checks()
    run: AuditRun = AuditRun()


def contradictions(settings: AuditSettings) -> Iterator[Contradiction]:
    """Yields every combination of settings that cannot work."""
    data = settings.data
    if not data.train_dir:
        yield Contradiction(("train_dir",), "no data: set a folder of images")
    paths = (data.train_dir, data.validation_dir, data.exclude, None, data.labels_file)
    if data.problem_type == MULTI_LABEL and not data.labels_file:
        yield Contradiction(
            ("problem_type", "labels_file"), "class folders give each image one class: set --labels_file"
        )
    if data.problem_type == MULTI_LABEL and data.validation_dir:
        text = "class folders give each image one class: use the column of splits of --labels_file"
        yield Contradiction(("problem_type", "validation_dir"), text)
    wrong = [*missing_paths(*paths), *impossible_output(settings.run.output_dir)]
    wrong += same_folders(data.train_dir, validation_dir=data.validation_dir)
    if data.predictions and not os.path.lexists(data.predictions):
        wrong.append(Contradiction(("predictions",), f"no such file: {data.predictions}"))
    yield from wrong
    if wrong:
        return
    for name in ("image_column_name", "label_column_name", "split_column_name", "group_column_name"):
        if getattr(data, name) and not data.labels_file:
            yield Contradiction((name, "labels_file"), f"--{name} is a column of --labels_file: set it as well")
    folders = {"train_dir": data.train_dir, "validation_dir": data.validation_dir}
    yield from inside_data("output_dir", settings.run.output_dir, **folders)
