"""Settings of an audit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lora_dist.settings.contradictions import impossible_output, missing_paths
from lora_dist.settings.train import Count, Group, NonNegative, Problem

Ratio = Annotated[float, Field(gt=1, allow_inf_nan=False)]


class AuditData(Group):
    """Data"""

    train_dir: str | None = None
    """A folder with one sub-folder of images a class."""
    validation_dir: str | None = None
    """The same for validation, to look for images that are in both."""
    exclude: str | None = None
    """Leave out the files listed in this text file, one path a line, such as an earlier audit's quarantine.txt."""


class Checks(Group):
    """Checks"""

    max_aspect_ratio: Ratio = 5.0
    """Find images whose longer side is more than this many times the shorter one."""
    max_imbalance: Ratio = 10.0
    """Find whether the largest class has more than this many times the training images of the smallest one."""
    min_class_images: Count = 10
    """Find classes with fewer training images."""
    near_distance: NonNegative = 0.12
    """How much near duplicates may differ, relative to their contrast; 0 looks for exact ones alone."""


class AuditRun(Group):
    """Run"""

    output_dir: str = "audit"
    """Directory for report.html, report.json and quarantine.txt, which are replaced if they are there."""
    num_workers: Count | None = None
    """Processes that read images. Default: one a core."""


class AuditSettings(Group):
    """Settings of an audit, by group."""

    data: AuditData = AuditData()
    checks: Checks = Checks()
    run: AuditRun = AuditRun()


def contradictions(settings: AuditSettings) -> Iterator[Problem]:
    """Yields every combination of settings that cannot work."""
    data = settings.data
    if not data.train_dir:
        yield Problem(("train_dir",), "no data: give a folder of images")
    paths = (data.train_dir, data.validation_dir, data.exclude)
    wrong = [*missing_paths(*paths), *impossible_output(settings.run.output_dir)]
    yield from wrong
    if wrong:
        return
    output = Path(settings.run.output_dir).resolve()
    for name, directory in (("train_dir", data.train_dir), ("validation_dir", data.validation_dir)):
        if directory and output.is_relative_to(Path(directory).resolve()):
            yield Problem(("output_dir", name), "the report would become part of the data: name another directory")
