"""Derives findings from facts about files: faults, duplicates, and the sizes of classes."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from PIL import Image

from lora_dist.audit.findings import FAULTS, KINDS, Finding, Scanned, left_out
from lora_dist.audit.near_duplicates import connected, near_pairs
from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.formats import HEIC_ADVICE, HEIC_SUFFIXES
from lora_dist.data.pixels.limits import is_too_thin
from lora_dist.data.sources.image_files import by_kind
from lora_dist.settings.audit import Checks

SAME_FORMAT = {"MPO": "JPEG"}
"""Phones write MPO files (several JPEG images in one file) with the suffix .jpg."""
SMALL_SHARE = 0.2
"""Largest share of the readable images of a class in a split that the audit leaves out without asking."""
SHOWN_NAMES = 3
"""Number of ignored files to name in a message."""


def check(
    scanned: Scanned,
    classes: Sequence[str],
    has_validation: bool,
    checks: Checks,
    ignored: Iterable[tuple[str, str]] = (),
    conversion: Conversion = AS_TRANSFORMERS,
) -> list[Finding]:
    """Returns all findings, ordered by kind.

    Args:
        classes: Names of all classes, including empty ones.
        has_validation: Whether there is a validation folder; otherwise, training images are held out.
        checks: Limits.
        ignored: Split and relative path of each file that training ignores.
        conversion: How the scan converted the images to 8-bit RGB.
    """
    findings = [
        *_ignored(ignored),
        *_single(scanned, checks),
        *_converted(scanned, conversion),
        *_exact(scanned),
        *_near(scanned, checks.near_distance),
    ]
    findings = _with_questions(scanned, findings)
    out = left_out(findings)
    before, after = (
        Counter(part for index, file in enumerate(scanned.files) if index not in gone for part in file.parts)
        for gone in (set(), out)
    )
    findings += _classes(classes, before, after, has_validation, checks)
    order = list(KINDS)
    return sorted(findings, key=lambda finding: (order.index(finding.kind.name), finding.files))


def _single(scanned: Scanned, checks: Checks) -> Iterator[Finding]:
    """Yields faults of single files."""
    formats = Image.registered_extensions()
    for index, (file, facts) in enumerate(zip(*scanned, strict=True)):
        if facts.fault:
            yield Finding(KINDS[facts.fault], facts.message, [index], left_out=[index])
            continue
        suffix = os.path.splitext(file.path)[1].lower()
        named = formats.get(suffix, facts.format)
        if SAME_FORMAT.get(named, named) != SAME_FORMAT.get(facts.format, facts.format):
            yield Finding(KINDS["wrong_extension"], f"{suffix} file with {facts.format} content", [index])
        if facts.width * facts.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            yield Finding(KINDS["huge"], f"{facts.width * facts.height / 1e6:,.0f} million pixels", [index])
        if is_too_thin((facts.width, facts.height)):
            yield Finding(KINDS["thin"], f"{facts.width} x {facts.height}", [index])
        elif max(facts.width, facts.height) > checks.max_aspect_ratio * min(facts.width, facts.height):
            yield Finding(KINDS["aspect_ratio"], f"{facts.width} x {facts.height}", [index])


def _converted(scanned: Scanned, conversion: Conversion) -> Iterator[Finding]:
    """Yields images that the conversion to 8-bit RGB scales or hides, and images that show nothing."""
    deep = [index for index, facts in enumerate(scanned.facts) if facts.mode]
    if deep:
        modes = ", ".join(sorted({scanned.facts[index].mode for index in deep}))
        if conversion.pixel_range is None:
            scale = "too few to find their range; set --pixel_range"
        else:
            scale = "{:g} to {:g} become 0 to 255".format(*conversion.pixel_range)
        yield Finding(KINDS["deep"], f"{_count(deep)} of mode {modes}; {scale}", deep)
    hidden = [index for index, facts in enumerate(scanned.facts) if facts.hidden]
    if hidden:
        yield Finding(KINDS["hidden"], _count(hidden), hidden)
    for index, facts in enumerate(scanned.facts):
        if facts.flat and not facts.hidden:
            yield Finding(KINDS["constant"], "", [index])


def _count(indices: Sequence[int]) -> str:
    return f"{len(indices):,} image" + "s" * (len(indices) != 1)


def _ignored(ignored: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Yields ignored files by split and suffix, and names some of them."""
    splits: dict[str, list[str]] = defaultdict(list)
    for split, path in ignored:
        splits[split].append(path)
    for split, paths in sorted(splits.items()):
        for kind, some in by_kind(paths).items():
            named = ", ".join(sorted(some)[:SHOWN_NAMES])
            advice = f"; {HEIC_ADVICE}" if kind.split(" ", maxsplit=1)[0] in HEIC_SUFFIXES else ""
            yield Finding(KINDS["ignored"], f"{split}: {kind}: {len(some):,}, e.g. {named}{advice}")


def _exact(scanned: Scanned) -> Iterator[Finding]:
    """Yields groups of images with the same pixels."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, facts in enumerate(scanned.facts):
        if facts.digest and not facts.flat:
            groups[facts.digest].append(index)
    for group in groups.values():
        if len(group) < 2:
            continue
        train, validation = (_of_split(scanned, group, split) for split in ("train", "validation"))
        conflict = len({scanned.files[index].label for index in group}) > 1
        if conflict:
            yield Finding(KINDS["conflict"], _labels(scanned, group), group, left_out=group)
        if train and validation:
            yield Finding(KINDS["leak"], "", group, left_out=train + validation[1:])
        elif not conflict:
            yield Finding(KINDS["duplicate"], "", group, left_out=group[1:])


def _near(scanned: Scanned, distance: float) -> Iterator[Finding]:
    """Yields groups of images that near duplicates connect."""
    if not distance:
        return
    # Compares only one of several exact duplicates per class and split.
    firsts: dict[tuple[bytes, str, str], int] = {}
    for index, (file, facts) in enumerate(zip(*scanned, strict=True)):
        if facts.digest and not facts.flat:
            firsts.setdefault((facts.digest, file.split, file.label), index)
    indices = list(firsts.values())
    facts_of = [scanned.facts[index] for index in indices]
    pairs: dict[str, list[tuple[int, int]]] = {"near_leak": [], "near_conflict": [], "near_duplicate": []}
    for pair in near_pairs([facts.phash for facts in facts_of], [facts.colors for facts in facts_of], distance):
        first, second = (indices[index] for index in pair)
        if scanned.facts[first].digest == scanned.facts[second].digest:
            continue
        one, other = scanned.files[first], scanned.files[second]
        if one.label != other.label:
            pairs["near_conflict"].append((first, second))
        if one.split != other.split:
            pairs["near_leak"].append((first, second))
        elif one.label == other.label:
            pairs["near_duplicate"].append((first, second))
    for group in connected(pairs["near_leak"]):
        yield Finding(KINDS["near_leak"], "", group, left_out=_of_split(scanned, group, "train"))
    for group in connected(pairs["near_conflict"]):
        yield Finding(KINDS["near_conflict"], _labels(scanned, group), group)
    for group in connected(pairs["near_duplicate"]):
        yield Finding(KINDS["near_duplicate"], "", group, proposed=group[1:])


def _of_split(scanned: Scanned, group: Iterable[int], split: str) -> list[int]:
    return [index for index in group if scanned.files[index].split == split]


def _labels(scanned: Scanned, group: Iterable[int]) -> str:
    return " and ".join(dict.fromkeys(scanned.files[index].label for index in group))


def _with_questions(scanned: Scanned, findings: Sequence[Finding]) -> list[Finding]:
    """Replaces findings that leave out more than `SMALL_SHARE` of a class by findings that only propose it."""
    files = scanned.files
    readable = Counter(part for file, facts in zip(*scanned, strict=True) if not facts.fault for part in file.parts)
    judged = [finding for finding in findings if finding.left_out and finding.kind.name not in FAULTS]
    out = Counter(part for index in left_out(judged) for part in files[index].parts)
    large = {part for part, count in out.items() if count > SMALL_SHARE * readable[part]}

    def is_question(finding: Finding) -> bool:
        return finding in judged and any(not large.isdisjoint(files[index].parts) for index in finding.left_out)

    asked = [
        finding._replace(left_out=(), proposed=finding.left_out) if is_question(finding) else finding
        for finding in findings
    ]
    for split, label in sorted(large):
        kinds = Counter(
            finding.kind.title.lower()
            for finding in judged
            if any((split, label) in files[index].parts for index in finding.left_out)
        )
        named = ", ".join(f"{kind}: {count:,}" for kind, count in kinds.items())
        message = f"{label}: {out[split, label]:,} of {readable[split, label]:,} {split} images; {named}"
        asked.append(Finding(KINDS["large_share"], message))
    return asked


def _classes(
    classes: Sequence[str],
    before: Counter[tuple[str, str]],
    after: Counter[tuple[str, str]],
    has_validation: bool,
    checks: Checks,
) -> Iterator[Finding]:
    """Yields findings about the number of images per class `before` and `after` files are left out."""

    def counted(split: str, name: str) -> str:
        count, total = after[split, name], before[split, name]
        named = f"{split if split == 'validation' else 'training'} image" + "s" * (total != 1)
        return f"{count:,} {named}" if count == total else f"{count:,} of {total:,} {named} left"

    for name in classes:
        train, validation = after["train", name], after["validation", name]
        if has_validation and bool(train) != bool(validation):
            yield Finding(KINDS["one_split"], f"{name}: {counted('train', name)}, {counted('validation', name)}")
        elif not has_validation and train == 1:
            yield Finding(KINDS["one_split"], f"{name}: {counted('train', name)}, none can be held out for validation")
        if train < checks.min_class_images and (train or not (has_validation and validation)):
            yield Finding(KINDS["few_images"], f"{name}: {counted('train', name)}")
    sizes = Counter({name: count for (split, name), count in after.items() if split == "train"})
    if sizes:
        (largest, most), (smallest, least) = sizes.most_common(1)[0], sizes.most_common()[-1]
        if most > checks.max_imbalance * least:
            yield Finding(
                KINDS["imbalance"], f"{largest}: {counted('train', largest)}, {smallest}: {counted('train', smallest)}"
            )
