"""Scans and checks the images of a data set, and writes the report."""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lora_dist import demo
from lora_dist.audit.checks import check
from lora_dist.audit.findings import File, Scanned, left_out
from lora_dist.audit.label_findings import label_findings, read_out_of_fold
from lora_dist.audit.pool import in_processes
from lora_dist.audit.report import Report, counted, write_json, write_page, write_quarantine
from lora_dist.audit.scan import Facts, range_pixels, scan, thumbnail
from lora_dist.data.pixels.conversion import Conversion
from lora_dist.data.pixels.images import RANGE_IMAGES, range_of
from lora_dist.data.sources.class_names import require_distinct, warn_of_similar
from lora_dist.data.sources.exclusions import absolute, read_exclusions
from lora_dist.data.sources.folders import read_class_folders
from lora_dist.data.sources.labels_file import Listed, given_columns, read_labels_file
from lora_dist.processes.cores import available_cores
from lora_dist.settings.audit import AuditData, AuditSettings
from lora_dist.settings.fields import MULTI_LABEL, color_of
from lora_dist.storage.atomic import replace_files
from lora_dist.storage.writable import writing

LIKELY_WRONG = "likely_wrong.txt"


def audit(settings: AuditSettings) -> Report:
    """Scans and checks the data.

    Raises:
        UserError: There are no images to audit, or they are not in class folders.
    """
    data = settings.data
    named = {"train": data.train_dir, "validation": data.validation_dir}
    folders = {split: demo.local_path(name) for split, name in named.items() if name}
    excluded = read_exclusions(data.exclude) if data.exclude else frozenset()
    files, classes, ignored = _images(data, folders, excluded)
    require_distinct(classes)
    warn_of_similar(classes)
    has_validation = "validation" in folders or any(file.split == "validation" for file in files)
    training = [file.path for file in files if file.split == "train"]
    # Ahead of the images, whose scan takes long.
    predictions = read_out_of_fold(data.predictions, data.problem_type == MULTI_LABEL) if data.predictions else None
    conversion = _conversion(settings.data, training, _workers(settings))
    scanned = _scan(files, _workers(settings), conversion)
    findings = check(scanned, classes, has_validation, settings.checks, ignored, conversion)
    notes: list[str] = []
    if predictions is not None:
        found_labels = label_findings(scanned, predictions, str(data.predictions))
        findings += found_labels.findings
        notes += found_labels.notes
    if has_validation:
        folders.setdefault("validation", folders["train"])
    return Report(folders, classes, scanned, findings, excluded, conversion, notes)


def _images(
    data: AuditData, folders: Mapping[str, str], excluded: Collection[str]
) -> tuple[list[File], list[str], list[tuple[str, str]]]:
    """Returns the images, the names of all classes, and the split and relative path of each file that is ignored."""
    files: list[File] = []
    classes: dict[str, None] = {}
    ignored: list[tuple[str, str]] = []
    if data.labels_file:
        listed = _listed(data, folders["train"], excluded)
        classes |= dict.fromkeys(listed.classes)
        files += (
            _listed_file(path, "train" if split == "train" else "validation", listed.classes, label)
            for path, label, split in sorted(
                zip(listed.paths, listed.labels, listed.splits, strict=True), key=lambda one: one[2] != "train"
            )
            if absolute(path) not in excluded
        )
        ignored += (("train", os.path.relpath(path, folders["train"])) for path in listed.ignored)
    for split, folder in folders.items():
        if split == "train" and data.labels_file:
            continue
        found = read_class_folders(folder, f"{split}_dir", list(classes), excluded)
        classes |= dict.fromkeys(found.classes)
        ignored += ((split, os.path.relpath(path, folder)) for path in found.ignored)
        files += (
            File(path, split, found.classes[label])
            for path, label in zip(found.paths, found.labels, strict=True)
            if absolute(path) not in excluded
        )
    return files, list(classes), ignored


def _listed(data: AuditData, folder: str, excluded: Collection[str]) -> Listed:
    multi_label = data.problem_type == MULTI_LABEL
    return read_labels_file(folder, data.labels_file or "", given_columns(data), excluded, multi_label=multi_label)


def _listed_file(path: str, split: str, classes: Sequence[str], label: int | list[int]) -> File:
    """A file with a class, or with the list of its labels."""
    if isinstance(label, int):
        return File(path, split, classes[label])
    names = tuple(classes[index] for index in label)
    return File(path, split, ";".join(names) or "(no label)", names)


def _conversion(data: AuditData, paths: Sequence[str], workers: int) -> Conversion:
    """Returns the conversion of training. The pixel range is approximate: training may hold out some of the images."""
    conversion = Conversion(color_of(data.transparent_background), all_depths=True)
    if data.pixel_range is not None:
        return conversion._replace(pixel_range=(data.pixel_range[0], data.pixel_range[1]))
    sample = paths[:: -(-len(paths) // RANGE_IMAGES) or 1]
    found = in_processes(partial(range_pixels, conversion=conversion), sample, workers, None)
    return conversion._replace(pixel_range=range_of(pixels for _, pixels in found))


def _workers(settings: AuditSettings) -> int:
    return settings.run.num_workers or available_cores()


def _scan(files: Sequence[File], workers: int, conversion: Conversion) -> Scanned:
    failed = Facts("unreadable", "the process that read it crashed or hung")
    facts = [failed] * len(files)
    work = partial(scan, conversion=conversion)
    with closing(in_processes(work, [file.path for file in files], workers, failed)) as results:
        bar = tqdm(results, total=len(files), unit=" images", dynamic_ncols=True, disable=not sys.stderr.isatty())
        for index, found in bar:
            facts[index] = found
    return Scanned(files, facts)


def write_report(report: Report, settings: AuditSettings) -> None:
    """Writes the files and prints the summary."""
    output = Path(settings.run.output_dir)
    judges_labels = settings.data.predictions is not None

    def thumbnails(indices: Sequence[int]) -> dict[int, str]:
        readable = [index for index in indices if not report.scanned.facts[index].fault]
        paths = [report.scanned.files[index].path for index in readable]
        work = partial(thumbnail, conversion=report.conversion)
        return {readable[index]: found for index, found in in_processes(work, paths, _workers(settings), "")}

    with writing(output, "output_dir"), replace_files(output) as directory:
        write_page(report, directory / "report.html", thumbnails)
        write_json(report, directory / "report.json")
        write_quarantine(report, directory / "quarantine.txt")
        if judges_labels:
            write_quarantine(report, directory / LIKELY_WRONG, also=["label_issue"])
    for line in report.lines():
        print(line)
    count = len(report.excluded) + len(left_out(report.findings))
    if count:
        print(f"{counted(count, 'file')} to leave out: lora_dist.train --exclude {output / 'quarantine.txt'}")
    if proposed := report.counts()["proposed"]:
        print(f"that list proposes {proposed:,} more, commented out with #: look at them first")
    if judges_labels:
        number = sum(finding.kind.name == "label_issue" for finding in report.findings)
        are = "is" if number == 1 else "are"
        print(
            f"{counted(number, 'label')} {are} likely wrong; to leave these out as well: "
            f"--exclude {output / LIKELY_WRONG}"
        )
    print(f"report: {output / 'report.html'}")
