"""The kinds of findings, their severity, and the data that findings refer to."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from lora_dist.audit.scan import Facts


class Severity(StrEnum):
    """Errors stop a run or falsify its results. Warnings need a person's judgment."""

    ERROR = "error"
    WARNING = "warning"


EXIT_CODES = {Severity.WARNING: 3, Severity.ERROR: 4}
"""Exit code by severity. Python uses 1 for a crash; 2 means invalid settings."""


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        name: Key in the JSON report.
        meaning: What it is, and whether its files are left out.
    """

    name: str
    severity: Severity
    title: str
    meaning: str


_ERRORS = {
    "empty": ("Empty files", "Files of 0 bytes. Left out."),
    "truncated": ("Truncated images", "The end of the file is missing. Left out."),
    "unreadable": ("Unreadable images", "The file cannot be decoded. Left out."),
    "bomb": ("Decompression bombs", "The image has too many pixels to decode. Left out. To keep such images, "
             "raise --max_image_pixels."),
    "leak": ("Leaks", "The same pixels are in training and validation, which makes validation metrics too good. Left "
             "out of training; the first copy in validation is kept."),
    "conflict": ("Same image in several classes", "The same pixels have different labels; at most one label is right. "
                 "All copies are left out."),
    "one_split": ("Classes in one split only", "Training needs images of each class in both splits, unless "
                  "--allow_missing_classes is set."),
}  # fmt: skip
FAULTS = ("empty", "truncated", "unreadable", "bomb")
"""Kinds of files that training cannot read."""
_WARNINGS = {
    "near_leak": ("Near leaks", "Almost the same image is in training and validation, e.g. resized or compressed. Left "
                  "out of training."),
    "near_conflict": ("Near duplicates in several classes", "Almost the same image has different labels. Not left out, "
                      "because one label may be right."),
    "label_issue": ("Labels that are likely wrong", "A model that did not train on the image confidently predicts "
                    "another class, or other labels (--predictions). The most confident predictions come first. "
                    "Not left out, because the model may be wrong: correct the labels that are wrong, or leave out all "
                    "of these images with --exclude likely_wrong.txt."),
    "duplicate": ("Duplicates", "The same pixels are in a class several times. All but the first are left out."),
    "near_duplicate": ("Near duplicates", "Almost the same image is in a class several times. Not left out; the list "
                       "proposes all copies except the first, commented out with #."),
    "wrong_extension": ("Wrong extensions", "The file is of another format than its name says. Training can read it; "
                        "other programs may not."),
    "huge": ("Huge images", "Pillow warns of a decompression bomb. The image can be read, but needs a lot of time and "
             "memory; consider a smaller copy."),
    "aspect_ratio": ("Extreme aspect ratios", "A square input crops or distorts most of such an image."),
    "thin": ("Too long and thin", "Resizing the shorter side, as the image processors of DINOv2, CLIP and ConvNeXt do, "
             "would take too much memory: training and predict treat such an image as unreadable. Processors that "
             "resize to a fixed size, such as ViT's, read it."),
    "deep": ("More than 8 bits", "Training scales these pixels to 8 bits with one range for all images; see "
             "--pixel_range."),
    "hidden": ("Hidden by the background", "The background of these transparent images has the color of their content. "
               "Train with another --transparent_background."),
    "constant": ("Constant images", "All pixels have nearly the same color, so the image shows nothing. Not compared "
                 "with other images."),
    "ignored": ("Ignored files", "Training ignores files outside of class folders, files without an image suffix, "
                "and folders of the system."),
    "large_share": ("Large part of a class", "Without all these copies, a class would lose many of its images. Not "
                    "left out, because there may be another cause: look at them first. The list proposes them, "
                    "commented out with #."),
    "imbalance": ("Class imbalance", "Rare classes are hard to learn, and accuracy hides errors on them. Look at macro "
                  "F1."),
    "few_images": ("Classes with few images", "Too few images to learn the class."),
}  # fmt: skip
KINDS = {name: Kind(name, Severity.ERROR, *texts) for name, texts in _ERRORS.items()} | {
    name: Kind(name, Severity.WARNING, *texts) for name, texts in _WARNINGS.items()
}


class File(NamedTuple):
    """An image file; `split` is `train` or `validation`.

    Attributes:
        label: the name of its class, or its labels with semicolons between them.
        names: its labels, if an image can have several; None for one class.
    """

    path: str
    split: str
    label: str
    names: tuple[str, ...] | None = None

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Split and name of each class that the file counts for."""
        return [(self.split, name) for name in ((self.label,) if self.names is None else self.names)]


class Scanned(NamedTuple):
    """All files, training first and each split sorted by class and path, and the facts about each file."""

    files: Sequence[File]
    facts: Sequence[Facts]


class Finding(NamedTuple):
    """A finding; files are given as indices into `Scanned.files`.

    Attributes:
        message: Details; empty if the files say everything.
        files: The affected files.
        left_out: Those that training should leave out.
        proposed: Those that a person might leave out as well.
    """

    kind: Kind
    message: str = ""
    files: Sequence[int] = ()
    left_out: Sequence[int] = ()
    proposed: Sequence[int] = ()


def left_out(findings: Iterable[Finding]) -> set[int]:
    """Indices of all files that training should leave out."""
    return {index for finding in findings for index in finding.left_out}


def exit_code(findings: Iterable[Finding]) -> int:
    """Exit code of the worst finding; 0 without findings."""
    return max((EXIT_CODES[finding.kind.severity] for finding in findings), default=0)
