"""The report of an audit: a self-contained HTML page, JSON, and lines for the terminal."""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lora_dist.audit.findings import KINDS, Finding, Kind, Scanned, Severity, exit_code, left_out
from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.sources.exclusions import Section, write_exclusions

SHOWN_FINDINGS = 40
"""Findings per kind on the page. The JSON report has all of them."""
SHOWN_FILES = 8
"""Files per finding on the page."""
SHOWN_LINES = 3
"""Findings per kind in the terminal."""


@dataclass(frozen=True)
class Report:
    """The results of an audit.

    Attributes:
        folders: Folder of each split.
        classes: Names of all classes.
        findings: Ordered by kind, the worst first.
        excluded: Absolute paths from `--exclude`.
        conversion: How the images became 8-bit RGB.
        notes: Further lines for the terminal.
    """

    folders: Mapping[str, str]
    classes: Sequence[str]
    scanned: Scanned
    findings: Sequence[Finding]
    excluded: Collection[str] = ()
    conversion: Conversion = AS_TRANSFORMERS
    notes: Sequence[str] = ()

    def by_kind(self) -> dict[Kind, list[Finding]]:
        """Findings of each kind that occurs."""
        found = {
            kind: [finding for finding in self.findings if finding.kind.name == name] for name, kind in KINDS.items()
        }
        return {kind: findings for kind, findings in found.items() if findings}

    def counts(self) -> dict[str, int]:
        """Total numbers of images, classes and findings."""
        severities = Counter(finding.kind.severity for finding in self.findings)
        splits = Counter(file.split for file in self.scanned.files)
        return {
            "images": len(self.scanned.files),
            "train": splits["train"],
            "validation": splits["validation"],
            "classes": len(self.classes),
            "errors": severities[Severity.ERROR],
            "warnings": severities[Severity.WARNING],
            "left_out": len(left_out(self.findings)),
            "proposed": len({index for finding in self.findings for index in finding.proposed}),
        }

    def class_counts(self) -> list[dict[str, Any]]:
        """Number of files of each class by split, and of training images that are not left out."""
        files = self.scanned.files
        counts = Counter(part for file in files for part in file.parts)
        gone = Counter(part for index in left_out(self.findings) for part in files[index].parts)
        return [
            {
                "class": name,
                "train": counts["train", name],
                "validation": counts["validation", name],
                "train_kept": counts["train", name] - gone["train", name],
            }
            for name in self.classes
        ]

    def lines(self) -> Iterator[str]:
        """Yields the lines of a summary for the terminal."""
        counts = self.counts()
        yield (
            f"{counts['images']:,} images in {counts['classes']:,} classes ({counts['train']:,} training, "
            f"{counts['validation']:,} validation): {counted(counts['errors'], 'error')}, "
            f"{counted(counts['warnings'], 'warning')}"
        )
        for kind, findings in self.by_kind().items():
            yield f"{kind.severity}: {kind.title.lower()}: {len(findings):,}"
            yield from (f"    {self._line(finding)}" for finding in findings[:SHOWN_LINES])
            if len(findings) > SHOWN_LINES:
                yield f"    and {len(findings) - SHOWN_LINES:,} more"
        yield from self.notes

    def _line(self, finding: Finding) -> str:
        names = [visible(self.scanned.files[index].path) for index in finding.files[:SHOWN_LINES]]
        more = [f"{len(finding.files) - SHOWN_LINES:,} more"] if len(finding.files) > SHOWN_LINES else []
        message = [visible(finding.message)] if finding.message else []
        return ": ".join([*([", ".join(names + more)] if names else []), *message])


def counted(count: int, noun: str) -> str:
    """Returns `1 error` or `2 errors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def visible(text: str) -> str:
    """Escapes characters that are invisible or break lines, and bytes that are not UTF-8."""
    return "".join(
        # Zero-width joiners are part of emoji.
        character if character.isprintable() or character == "\u200d" else ascii(character)[1:-1]
        for character in text
    )


def write_json(report: Report, file: Path) -> None:
    """Writes all findings and files as JSON."""
    content = {
        "folders": report.folders,
        "exit_code": exit_code(report.findings),
        "counts": report.counts(),
        "classes": report.class_counts(),
        "findings": [
            {
                "kind": finding.kind.name,
                "severity": finding.kind.severity,
                "message": finding.message,
                "files": [_described(report.scanned, index) for index in finding.files],
                "left_out": [report.scanned.files[index].path for index in finding.left_out],
            }
            for finding in report.findings
        ],
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # Names that are not UTF-8 become JSON escapes.
    file.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _described(scanned: Scanned, index: int) -> dict[str, Any]:
    file, facts = scanned.files[index], scanned.facts[index]
    described: dict[str, Any] = {"path": file.path, "split": file.split, "class": file.label}
    return described | ({} if facts.fault else {"format": facts.format, "width": facts.width, "height": facts.height})


def write_page(report: Report, file: Path, thumbnails: Callable[[Sequence[int]], dict[int, str]]) -> None:
    """Writes the HTML page.

    Args:
        thumbnails: Maps indices of files to `data:` URLs; unreadable files may be missing.
    """
    by_kind = {kind: findings[:SHOWN_FINDINGS] for kind, findings in report.by_kind().items()}
    shown = {index for some in by_kind.values() for finding in some for index in finding.files[:SHOWN_FILES]}
    pictures = thumbnails(sorted(shown))
    numbers = Counter(finding.kind for finding in report.findings)
    out = left_out(report.findings)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "number": "{:,}".format}
    source = (resources.files("lora_dist.audit") / "report.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        report=report,
        counts=report.counts(),
        class_counts=report.class_counts(),
        worst=exit_code(report.findings),
        sections=[
            {
                "kind": kind,
                "number": numbers[kind],
                "findings": [_shown(report, finding, pictures, out) for finding in findings],
            }
            for kind, findings in by_kind.items()
        ],
    )
    file.write_text(page, encoding="utf-8", errors="backslashreplace")


def _shown(report: Report, finding: Finding, pictures: dict[int, str], out: set[int]) -> dict[str, Any]:
    images = []
    for index in finding.files[:SHOWN_FILES]:
        path, split, *_ = report.scanned.files[index]
        images.append(
            {
                "path": path,
                "name": os.path.relpath(path, report.folders[split]),
                "split": split,
                "facts": report.scanned.facts[index],
                "picture": pictures.get(index, ""),
                "left_out": index in out,
            }
        )
    return {"message": finding.message, "images": images, "more": max(0, len(finding.files) - SHOWN_FILES)}


def write_quarantine(report: Report, file: Path, also: Collection[str] = ()) -> None:
    """Writes the list of files to leave out, each under the first kind of finding that leaves it out.

    Files from `--exclude` come first, because this list may replace that file.

    Args:
        also: Names of kinds whose proposed files are left out as well.
    """
    names = report.scanned.files
    listed: set[int] = set()
    sections = [Section("From --exclude", sorted(report.excluded))] if report.excluded else []
    chosen = {kind: findings for kind, findings in report.by_kind().items() if kind.name in also}
    by_kind = report.by_kind()
    for attribute, active, kinds in (
        ("left_out", True, by_kind),
        ("proposed", True, chosen),
        ("proposed", False, by_kind),
    ):
        for kind, findings in kinds.items():
            indices = {index for finding in findings for index in getattr(finding, attribute)} - listed
            listed |= indices
            if indices:
                sections.append(Section(kind.title, [names[index].path for index in sorted(indices)], active))
    write_exclusions(file, sections)
