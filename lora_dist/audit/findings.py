"""What an audit can find: the kinds, how bad each is, and what becomes of the files."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from lora_dist.audit.scan import Facts


class Severity(StrEnum):
    """How bad a finding is: errors end a run, or make its results untrue; warnings are for a person to judge."""

    ERROR = "error"
    WARNING = "warning"


EXIT_CODES = {Severity.WARNING: 3, Severity.ERROR: 4}
"""1 is a crash, and 2 a mistake in the settings."""


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        name: in the JSON report.
        severity: of each finding of this kind.
        title: heading.
        meaning: what it is, and what becomes of the files.
    """

    name: str
    severity: Severity
    title: str
    meaning: str


KINDS = {
    kind.name: kind
    for kind in (
        Kind("empty", Severity.ERROR, "Empty files", "Files of no bytes. Left out."),
        Kind("truncated", Severity.ERROR, "Truncated images", "The end of the file is missing. Left out."),
        Kind("unreadable", Severity.ERROR, "Unreadable images", "These cannot be decoded. Left out."),
        Kind(
            "bomb", Severity.ERROR, "Decompression bombs",
            "So many pixels that Pillow refuses to decode them. Left out.",
        ),
        Kind(
            "leak", Severity.ERROR, "Leaks", "The same pixels in training and validation, whose results are then too "
            "good. Left out of training; of copies within validation, the first stays.",
        ),
        Kind(
            "conflict", Severity.ERROR, "One image under two classes", "The same pixels with different labels, of "
            "which one at most is right. All are left out.",
        ),
        Kind(
            "one_split", Severity.ERROR, "Classes in one split alone", "Training asks for images of each class in "
            "both splits; --allow_missing_classes lets it go on without images to validate on.",
        ),
        Kind(
            "near_leak", Severity.WARNING, "Near leaks", "The same picture in training and validation, resized, "
            "compressed or otherwise changed a little. Left out of training.",
        ),
        Kind(
            "near_conflict", Severity.WARNING, "Near copies under two classes", "The same picture, changed a little, "
            "with different labels. Nothing is left out for that: one of them may be right.",
        ),
        Kind(
            "duplicate", Severity.WARNING, "Duplicates", "The same pixels more than once in a class. The first "
            "stays, the others are left out.",
        ),
        Kind(
            "near_duplicate", Severity.WARNING, "Near duplicates", "The same picture more than once in a class, "
            "changed a little. The list proposes all but the first, behind a #, and leaves none out.",
        ),
        Kind(
            "wrong_extension", Severity.WARNING, "Wrong extensions", "The content is of another format than the name "
            "says. Training reads them; other programs may not.",
        ),
        Kind(
            "huge", Severity.WARNING, "Huge images", "So many pixels that Pillow suspects a decompression bomb. They "
            "can be read, each in a lot of time and memory; consider smaller copies.",
        ),
        Kind(
            "aspect_ratio", Severity.WARNING, "Extreme aspect ratios", "A square view shows little of such an image, "
            "or shows it badly squeezed.",
        ),
        Kind(
            "ignored", Severity.WARNING, "Ignored files", "In no class folder, or of no suffix that is taken for an "
            "image. Training does not see them.",
        ),
        Kind(
            "imbalance", Severity.WARNING, "Class imbalance", "A class seen rarely is learned badly, and accuracy "
            "hides it; look at macro F1.",
        ),
        Kind("few_images", Severity.WARNING, "Classes with few images", "Too few to learn a class from."),
    )
}  # fmt: skip


class File(NamedTuple):
    """An image file of the data.

    Attributes:
        path: as found.
        split: `train` or `validation`.
        label: name of its class.
    """

    path: str
    split: str
    label: str


class Scanned(NamedTuple):
    """All files of the data with what is known of them; a place in both is that of a file.

    Attributes:
        files: training first, each split sorted by class and path.
        facts: of each file.
    """

    files: Sequence[File]
    facts: Sequence[Facts]


class Finding(NamedTuple):
    """One finding.

    Attributes:
        kind: what.
        message: about this one; empty where its files say it all.
        files: places of the files that it is about.
        left_out: those of them that training should do without.
        proposed: those that a person might want to leave out as well.
    """

    kind: Kind
    message: str = ""
    files: Sequence[int] = ()
    left_out: Sequence[int] = ()
    proposed: Sequence[int] = ()


def left_out(findings: Iterable[Finding]) -> set[int]:
    """Places of all files that training should do without."""
    return {index for finding in findings for index in finding.left_out}


def exit_code(findings: Iterable[Finding]) -> int:
    """Of the worst finding; 0 if there is none."""
    return max((EXIT_CODES[finding.kind.severity] for finding in findings), default=0)
