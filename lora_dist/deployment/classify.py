"""Files to rows of predictions: find the images, decode them beside the model, write JSON lines or CSV."""

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_dist.data.pixels.images import UnreadableImageError, image_files, load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.figures import grid
from lora_dist.model.classifier import Classifier
from lora_dist.processes.workers import POLL_SECONDS, SILENT_SECONDS, from_workers, worker_loader
from lora_dist.storage.writable import writing

GRID = 32
TINY = 8_000
"""Bytes of a file below which a process to decode it takes more from the model's threads than it gives."""
PART = 32
"""Images, at least, that are decoded and handed over at once: that costs as much as to decode a few small ones."""


class Row(NamedTuple):
    """What is known of one image.

    Attributes:
        path: of the file, as found.
        top_k: classes with their probabilities, most likely first; empty where there is an error.
        error: why the image could not be read, or None.
        adapter: whose prediction this is, where there are several.
    """

    path: str
    top_k: list[tuple[str, float]]
    error: str | None = None
    adapter: str | None = None


def find_images(names: Sequence[str]) -> list[str]:
    """Files that `names` stand for: files as they are, folders with all below them, patterns; in order, each once.

    Raises:
        UserError: a folder or a pattern with no image, or a name of nothing.
    """
    found: dict[str, None] = {}
    for name in names:
        # That of `Path` fails on a name that is too long.
        if os.path.isdir(name):  # noqa: PTH112
            files = list(image_files(name))
        else:
            files = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not files:
            raise UserError(f"--images {name}: no images there")
        found.update(dict.fromkeys(files))
    return list(found)


def choose_device(name: str) -> torch.device:
    """The device to run on; `auto` takes an accelerator where there is one.

    Raises:
        UserError: no such device here.
    """
    try:
        if name == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not on this machine ({str(error).splitlines()[0]})") from error
    return device


def choose_batch_size(given: int | None, device: torch.device) -> int:
    """The number of images in a forward pass. On a CPU, a ViT-S took a seventh less time for 8 than for 32."""
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
    """Yields a row for each file, in order; a file that cannot be read gets one with its error.

    Args:
        classifier: to ask.
        files: paths.
        top_k: classes to name.
        batch_size: images in a forward pass.
        num_workers: decoding processes; None for one, where there are many files and these are not tiny.
        device: to run the model on.

    Raises:
        UserError: a logit is not finite.
    """
    classifier.model.to(device)
    size = max(batch_size, PART)
    workers = num_workers if num_workers is not None else int(len(files) > size and _take_time(files[:size]))
    starts = range(0, len(files), size)
    transforms = ImageTransforms(classifier.processor)
    loader = worker_loader(
        _Files(files, transforms),
        batch_sampler=[list(range(start, min(start + size, len(files)))) for start in starts],
        workers=workers,
        pin_memory=device.type == "cuda",
        timeout=POLL_SECONDS,
    )
    for part in from_workers(loader, SILENT_SECONDS):
        scores = _scores(classifier, transforms, part.pixels, top_k, batch_size, device)
        for path, error in zip(part.paths, part.errors, strict=True):
            yield Row(path, [] if error else next(scores), error)


def _take_time(files: Sequence[str]) -> bool:
    """Whether files take so long to decode that another process is worth it."""
    return sum(path.stat().st_size for path in map(Path, files) if path.is_file()) > TINY * len(files)


def _scores(
    classifier: Classifier,
    transforms: ImageTransforms,
    pixels: Tensor | None,
    top_k: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[list[tuple[str, float]]]:
    """Yields classes with their probabilities for each image, batch by batch."""
    for batch in () if pixels is None else pixels.split(batch_size):
        probabilities = classifier.probabilities(transforms.finished(batch.to(device, non_blocking=True)))
        best = probabilities.topk(min(top_k, len(classifier.labels)))
        for values, positions in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            yield [(classifier.labels[index], value) for index, value in zip(positions, values, strict=True)]


class _DecodedBatch(NamedTuple):
    """A batch of files: pixels of those that could be read, and the error of those that could not."""

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
                images.append(load_rgb(path))
                errors.append(None)
            except UnreadableImageError as error:
                errors.append(str(error))
        return _DecodedBatch(paths, errors, self.transforms.resized(images) if images else None)


def spread(total: int, count: int) -> list[int]:
    """At most `count` places among `total`, evenly spread: folders come sorted by class."""
    chosen = min(total, count)
    return [index * total // chosen for index in range(chosen)]


def draw_grid(rows: Sequence[Row], path: Path) -> None:
    """Draws images with their predictions into a PNG file."""
    shown = [row for row in rows if row.error is None]
    if not shown:
        raise UserError("--grid: none of the images to draw can be read")
    captions = [f"{row.top_k[0][0]}\n{row.top_k[0][1]:.1%}" for row in shown]
    with writing(path, "grid"):
        path.parent.mkdir(parents=True, exist_ok=True)
        grid([load_rgb(row.path) for row in shown], captions).save(path, "PNG")


@contextmanager
def writer(
    output: str | None, format_: Literal["jsonl", "csv"] | None, top_k: int, several: bool = False
) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row, to a file or to standard output, flushed row by row.

    Args:
        output: path, or None to print.
        format_: None to go by the path's suffix.
        top_k: number of class columns in a CSV.
        several: whether rows are of several adapters, which a CSV has a column for.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = format_ or ("csv" if output and output.lower().endswith(".csv") else "jsonl")
    if output is None:
        yield _csv_rows(_utf8_stdout(), top_k, several) if chosen == "csv" else _json_lines(_utf8_stdout())
        return
    path = Path(output)
    with writing(path, "output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of a name that is no text, bytes are escaped.
        file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
    try:
        write = _csv_rows(file, top_k, several) if chosen == "csv" else _json_lines(file)
        yield writing(path, "output")(write)
    finally:
        with writing(path, "output"):
            file.close()


def _utf8_stdout() -> Any:
    """Standard output in UTF-8 whatever the locale is; of a name that is no text, bytes are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    return sys.stdout


def _json_lines(file: Any) -> Callable[[Row], None]:
    def write(row: Row) -> None:
        content: dict[str, Any] = {} if row.adapter is None else {"adapter": row.adapter}
        content["path"] = row.path
        if row.error is None:
            label, score = row.top_k[0]
            content |= {"label": label, "score": score}
            content["top_k"] = [{"label": label, "score": score} for label, score in row.top_k]
        else:
            content["error"] = row.error
        file.write(json.dumps(content, ensure_ascii=False) + "\n")
        file.flush()

    return write


def _csv_rows(file: Any, top_k: int, several: bool) -> Callable[[Row], None]:
    lines = csv.writer(file)
    columns: Iterable[tuple[str, str]] = (
        (f"label{suffix}", f"score{suffix}") for suffix in ["", *(f"_{index}" for index in range(2, top_k + 1))]
    )
    lines.writerow([*(["adapter"] if several else []), "path", *chain.from_iterable(columns), "error"])

    def write(row: Row) -> None:
        cells = [cell for label, score in row.top_k for cell in (label, f"{score:.6f}")]
        lines.writerow(
            [*([row.adapter] if several else []), row.path, *cells, *[""] * (2 * top_k - len(cells)), row.error or ""]
        )
        file.flush()

    return write
