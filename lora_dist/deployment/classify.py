"""Finds images, classifies them, and writes the predictions as JSON lines or CSV."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import UnreadableImageError, load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sources.files import find_files, warn_of_ignored
from lora_dist.errors import UserError
from lora_dist.figures import grid
from lora_dist.model.classifier import Classifier
from lora_dist.processes.devices import computes_on_cpu
from lora_dist.processes.workers import POLL_SECONDS, SILENT_SECONDS, from_workers, worker_loader
from lora_dist.storage.writable import writing

GRID_IMAGES = 32
TINY_FILE = 8_000
"""Bytes of a file below which a decoding process costs more than it saves."""
MIN_DECODED = 32
"""Images, at least, that a decoding process returns at once, because each return has a fixed cost."""


class Row(NamedTuple):
    """The prediction for one image.

    Attributes:
        path: of the file, as found.
        top_k: classes with their probabilities, most likely first; empty if there is an error.
        error: why the image is unreadable, or None.
        adapter: name of the adapter, if there are several.
        labels: of a model of several labels, those above their thresholds with their scores, highest first; None of
            one class per image, which is the first of `top_k`.
    """

    path: str
    top_k: list[tuple[str, float]]
    error: str | None = None
    adapter: str | None = None
    labels: list[tuple[str, float]] | None = None

    @property
    def answer(self) -> list[tuple[str, float]]:
        """What the model says about a readable image: its labels, or its class."""
        return self.top_k[:1] if self.labels is None else self.labels


def find_images(names: Sequence[str]) -> list[str]:
    """Resolves files, folders (recursively) and patterns to files, in order and without duplicates.

    Raises:
        UserError: a name matches no image.
    """
    found: dict[str, None] = {}
    for name in names:
        # `Path.is_dir` fails on a name that is too long.
        if os.path.isdir(name):  # noqa: PTH112
            files, ignored = find_files(name)
            warn_of_ignored(name, ignored)
        else:
            files = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not files:
            raise UserError(f"--images {name}: no images found")
        found.update(dict.fromkeys(files))
    return list(found)


def choose_device(name: str) -> torch.device:
    """Returns the device; `auto` selects an accelerator if there is one, each process of a launch its own.

    Raises:
        UserError: the machine has no such device.
    """
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            if found is None or computes_on_cpu():
                return torch.device("cpu")
            if "LOCAL_RANK" not in os.environ:
                return found
            return torch.device(found.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from error
    return device


def choose_batch_size(given: int | None, device: torch.device) -> int:
    """Returns the batch size. On a CPU, batches of 8 took a seventh less time than of 32 with a ViT-S."""
    return given or (8 if device.type == "cpu" else 32)


@torch.inference_mode()
def classify(
    classifier: Classifier,
    files: Sequence[str],
    *,
    top_k: int,
    batch_size: int,
    num_workers: int | None,
    device: torch.device,
) -> Iterator[Row]:
    """Yields a row with `top_k` classes for each file, in order; that of an unreadable file has an error.

    `num_workers` decoding processes; None for one, or none if the files are few or tiny.

    Raises:
        UserError: a logit is not finite.
    """
    classifier.model.to(device)
    size = max(batch_size, MIN_DECODED)
    workers = num_workers if num_workers is not None else int(len(files) > size and _are_slow_to_decode(files[:size]))
    starts = range(0, len(files), size)
    transforms = ImageTransforms(classifier.processor, conversion=classifier.conversion)
    loader = worker_loader(
        _Files(files, transforms),
        batch_sampler=[list(range(start, min(start + size, len(files)))) for start in starts],
        workers=workers,
        pin_memory=device.type == "cuda",
        timeout=POLL_SECONDS,
    )
    for decoded in from_workers(loader, SILENT_SECONDS):
        batches = () if decoded.pixels is None else decoded.pixels.split(batch_size)
        inputs = (transforms.finished(batch.to(device, non_blocking=True)) for batch in batches)
        # Lazy, so that rows of a batch are written before the next batch runs.
        ranked = (row for batch in inputs for row in _answers(classifier, batch, top_k))
        for path, error in zip(decoded.paths, decoded.errors, strict=True):
            best, labels = ([], None) if error else next(ranked)
            yield Row(path, best, error, labels=labels)


def _answers(
    classifier: Classifier, batch: Tensor, top_k: int
) -> Iterator[tuple[list[tuple[str, float]], list[tuple[str, float]] | None]]:
    """For each image of a batch, the classes of `Row.top_k` and `Row.labels`."""
    probabilities = classifier.probabilities(batch)
    yield from zip(classifier.top_k(probabilities, top_k), classifier.chosen(probabilities), strict=True)


def _are_slow_to_decode(files: Sequence[str]) -> bool:
    """Whether a decoding process is worth its cost."""
    return sum(path.stat().st_size for path in map(Path, files) if path.is_file()) > TINY_FILE * len(files)


class _DecodedBatch(NamedTuple):
    """Paths and errors of files, and the pixels [B, 3, H, W] of the readable ones."""

    paths: list[str]
    errors: list[str | None]
    pixels: Tensor | None


class _Files(Dataset):
    def __init__(self, files: Sequence[str], transforms: ImageTransforms) -> None:
        self.files = files
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> _DecodedBatch:
        paths = [self.files[index] for index in indices]
        errors: list[str | None] = []
        images = []
        for path in paths:
            try:
                images.append(self.transforms.load(path))
                errors.append(None)
            except UnreadableImageError as error:
                errors.append(str(error))
        return _DecodedBatch(paths, errors, self.transforms.resized(images) if images else None)


def spread(total: int, count: int) -> list[int]:
    """Returns at most `count` of `total` indices, evenly spread, because folders are sorted by class."""
    chosen = min(total, count)
    return [index * total // chosen for index in range(chosen)]


def draw_grid(rows: Sequence[Row], path: Path, conversion: Conversion = AS_TRANSFORMERS) -> None:
    """Draws a PNG file with images and their predictions.

    Raises:
        UserError: no image is readable, or the file cannot be written.
    """
    shown = [row for row in rows if row.error is None]
    if not shown:
        raise UserError("--grid: none of its images can be read")
    captions = [
        f"{', '.join(label for label, _ in row.answer) or '(none)'}\n"
        f"{' '.join(f'{score:.1%}' for _, score in row.answer)}"
        for row in shown
    ]
    with writing(path, "grid"):
        path.parent.mkdir(parents=True, exist_ok=True)
        grid([load_rgb(row.path, conversion=conversion) for row in shown], captions).save(path, "PNG")


@contextmanager
def writer(
    output: str | None,
    format_: Literal["jsonl", "csv"] | None,
    top_k: int,
    with_adapter: bool = False,
    with_labels: bool = False,
) -> Iterator[Callable[[Row], None]]:
    """Yields a function that writes and flushes a row.

    Args:
        output: path, or None for standard output.
        format_: None to infer it from the path.
        top_k: number of classes in a CSV line.
        with_adapter: add the column `adapter` to a CSV.
        with_labels: add the column `labels` to a CSV, with semicolons between the labels.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = format_ or ("csv" if output and output.lower().endswith(".csv") else "jsonl")
    columns = partial(_csv_rows, top_k=top_k, with_adapter=with_adapter, with_labels=with_labels)
    to_rows = columns if chosen == "csv" else _json_lines
    if output is None:
        yield to_rows(_utf8_stdout())
        return
    path = Path(output)
    with writing(path, "output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Escapes bytes of file names that are not UTF-8.
        file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    try:
        yield writing(path, "output")(to_rows(file))
    finally:
        with writing(path, "output"):
            file.close()


def _utf8_stdout() -> Any:
    """Standard output in UTF-8 in any locale, with bytes of other file names escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    return sys.stdout


def _json_lines(file: Any) -> Callable[[Row], None]:
    def write(row: Row) -> None:
        content: dict[str, Any] = {} if row.adapter is None else {"adapter": row.adapter}
        content["path"] = row.path
        if row.error is None:
            top_k = _scored(row.top_k)
            content |= top_k[0] if row.labels is None else {"labels": _scored(row.labels)}
            content["top_k"] = top_k
        else:
            content["error"] = row.error
        file.write(json.dumps(content, ensure_ascii=False) + "\n")
        file.flush()

    return write


def _scored(classes: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in classes]


def _joined(labels: list[tuple[str, float]]) -> str:
    for label, _ in labels:
        if ";" in label:
            raise UserError(f"a CSV has semicolons between labels, and one is called {label!r}: use --format jsonl")
    return ";".join(label for label, _ in labels)


def _csv_rows(file: Any, top_k: int, with_adapter: bool, with_labels: bool) -> Callable[[Row], None]:
    lines = csv.writer(file)
    suffixes = ["", *(f"_{index}" for index in range(2, top_k + 1))]
    columns = [f"{name}{suffix}" for suffix in suffixes for name in ("label", "score")]
    adapter, labels = ["adapter"] if with_adapter else [], ["labels"] if with_labels else []
    lines.writerow([*adapter, "path", *labels, *columns, "error"])

    def write(row: Row) -> None:
        cells = [cell for label, score in row.top_k for cell in (label, f"{score:.6f}")]
        cells += [""] * (len(columns) - len(cells))
        adapter = [row.adapter] if with_adapter else []
        labels = [_joined(row.labels or [])] if with_labels else []
        lines.writerow([*adapter, row.path, *labels, *cells, row.error or ""])
        file.flush()

    return write
