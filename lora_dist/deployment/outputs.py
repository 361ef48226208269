"""Writes predictions as JSON Lines, CSV or parquet, and draws a grid of images with their predictions."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import ImageSource, load_rgb
from lora_dist.deployment.classify import Row
from lora_dist.errors import UserError
from lora_dist.figures import grid
from lora_dist.settings.predict import Format, OutputType, format_of
from lora_dist.storage.writable import writing

GRID_IMAGES = 32
RECORD = b"lora_dist"
"""Key in the metadata of a parquet file for the `record` of its origin, as JSON."""
GROUP_ROWS, GROUP_NUMBERS = 16_384, 2**22
"""Largest number of rows in a row group of a parquet file, and of numbers in its lists; these wait in memory."""


@contextmanager
def writer(
    output: str | None,
    format_: Format | None,
    top_k: int,
    with_adapter: bool = False,
    output_type: OutputType = "top_k",
    record: Mapping[str, Any] | None = None,
    multi_label: bool = False,
) -> Iterator[Callable[[Row], None]]:
    """Yields a function that writes a row: at once as JSON or CSV, in groups as parquet.

    A parquet file appears under its name when it is complete.

    Args:
        output: path, or None for standard output.
        format_: None to infer it from the path.
        top_k: number of classes in a CSV line.
        with_adapter: add the column `adapter` to a CSV or parquet file.
        output_type: content of the rows besides the most likely class. Only `top_k` for CSV.
        record: origin of the predictions, for the metadata of a parquet file, as JSON values.
        multi_label: add the column `labels` to a CSV, with semicolons between the labels, or to a parquet file.

    Raises:
        UserError: the file cannot be written.
    """
    chosen = format_of(output, format_)
    if chosen == "parquet":
        assert output is not None
        schema = _schema(output_type, with_adapter, multi_label).with_metadata({RECORD: json.dumps(record or {})})
        with _parquet_file(Path(output), schema) as write:
            yield lambda row: write(_content(row, output_type))
        return
    if chosen == "csv":
        to_rows = partial(_csv_rows, top_k=top_k, with_adapter=with_adapter, multi_label=multi_label)
    else:
        to_rows = partial(_json_lines, output_type=output_type)
    if output is None:
        with _writing_to_stdout():
            write_row = to_rows(_utf8_stdout())
        yield _writing_to_stdout()(write_row)
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


@contextmanager
def _writing_to_stdout() -> Iterator[None]:
    """Turns errors of this block, e.g. a full disk, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the predictions cannot be written to standard output ({error.strerror})") from error


def _content(row: Row, output_type: OutputType) -> dict[str, Any]:
    """The names and values of a row, without those that it lacks."""
    content: dict[str, Any] = {} if row.adapter is None else {"adapter": row.adapter}
    content["path"] = row.path
    if row.error is not None:
        return content | {"error": row.error}
    top_k = _scored(row.top_k)
    if row.labels is None:
        content |= {"label": row.label, "score": row.top_k[0][1]}
    else:
        content["labels"] = _scored(row.labels)
    if output_type == "top_k":
        return content | {"top_k": top_k}
    assert row.values is not None
    return content | {output_type: row.values}


def _json_lines(file: Any, output_type: OutputType) -> Callable[[Row], None]:
    def write(row: Row) -> None:
        # Only the values are no JSON yet: a float32 array.
        content = json.dumps(_content(row, output_type), ensure_ascii=False, default=lambda values: values.tolist())
        file.write(content + "\n")
        file.flush()

    return write


def _scored(classes: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in classes]


def require_separable(labels: Iterable[str], output: str | None, format_: Format | None) -> None:
    """Raises `UserError` if several labels of an image cannot be in one cell, because one has a semicolon."""
    if format_of(output, format_) == "csv" and (joined := next((label for label in labels if ";" in label), None)):
        raise UserError(f"a CSV has semicolons between labels, and one is called {joined!r}: use --format jsonl")


def _joined(labels: list[tuple[str, float]]) -> str:
    return ";".join(label for label, _ in labels)


def _csv_rows(file: Any, top_k: int, with_adapter: bool, multi_label: bool) -> Callable[[Row], None]:
    lines = csv.writer(file)
    suffixes = ["_1" if multi_label else "", *(f"_{index}" for index in range(2, top_k + 1))]
    columns = [f"{name}{suffix}" for suffix in suffixes for name in ("label", "score")]
    adapter, labels = ["adapter"] if with_adapter else [], ["labels"] if multi_label else []
    lines.writerow([*adapter, "path", *labels, *columns, "error"])

    def write(row: Row) -> None:
        cells = [cell for label, score in row.top_k for cell in (label, f"{score:.6f}")]
        cells[:1] = [row.label] if cells else []
        cells += [""] * (len(columns) - len(cells))
        adapter = [row.adapter] if with_adapter else []
        labels = [_joined(row.labels or [])] if multi_label else []
        lines.writerow([*adapter, row.path, *labels, *cells, row.error or ""])
        file.flush()

    return write


def _schema(output_type: OutputType, with_adapter: bool, multi_label: bool) -> pa.Schema:
    score = ("score", pa.float32())
    scored = pa.list_(pa.struct([("label", pa.string()), score]))
    values = scored if output_type == "top_k" else pa.list_(pa.float32())
    adapter = [("adapter", pa.string())] if with_adapter else []
    labels = [("labels", scored)] if multi_label else []
    columns = [("label", pa.string()), score, (output_type, values), ("error", pa.string())]
    return pa.schema([*adapter, ("path", pa.string()), *labels, *columns])


@contextmanager
def _parquet_file(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that adds a row to a file, which replaces `path` at the end."""
    final = path.resolve()
    aside = final.with_name(f".writing-{final.name}")
    pending: list[dict[str, Any]] = []
    held = 0

    def flush() -> None:
        nonlocal held
        if pending:
            file.write_table(pa.Table.from_pylist(pending, schema))
        pending.clear()
        held = 0

    def write(content: dict[str, Any]) -> None:
        nonlocal held
        # Arrow holds no text that is not Unicode.
        texts = {name: _unicode(value) for name, value in content.items() if isinstance(value, str)}
        pending.append(content | texts)
        held += sum(len(value) for name, value in content.items() if name not in texts and hasattr(value, "__len__"))
        if len(pending) >= GROUP_ROWS or held >= GROUP_NUMBERS:
            flush()

    with writing(path, "output"):
        final.parent.mkdir(parents=True, exist_ok=True)
        file = pq.ParquetWriter(aside, schema)
    try:
        yield writing(path, "output")(write)
        with writing(path, "output"):
            flush()
            file.close()
            aside.replace(final)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _unicode(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def spread(total: int, count: int) -> list[int]:
    """Returns at most `count` of `total` indices, evenly spread, because folders are sorted by class."""
    chosen = min(total, count)
    return [index * total // chosen for index in range(chosen)]


def caption(row: Row) -> str:
    """Returns the label or labels of an image with their scores, for a grid."""
    if row.labels is None:
        return f"{row.label}\n{row.top_k[0][1]:.1%}"
    names = ", ".join(label for label, _ in row.labels) or "(none)"
    return f"{names}\n{' '.join(f'{score:.1%}' for _, score in row.labels)}"


def draw_grid(
    rows: Sequence[tuple[Row, ImageSource]],
    path: Path,
    conversion: Conversion = AS_TRANSFORMERS,
    caption: Callable[[Row], str] = caption,
) -> None:
    """Draws a PNG file with images and their captions, by default their predictions.

    Raises:
        UserError: no image is readable, or the file cannot be written.
    """
    shown = [(row, source) for row, source in rows if row.error is None]
    if not shown:
        raise UserError("--grid: none of the images can be read")
    captions = [caption(row) for row, _ in shown]
    with writing(path, "grid"):
        path.parent.mkdir(parents=True, exist_ok=True)
        grid([load_rgb(source, row.path, conversion) for row, source in shown], captions).save(path, "PNG")
