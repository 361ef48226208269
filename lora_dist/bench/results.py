"""The CSV file of benchmark results, and its table in the documentation: `python -m lora_dist.bench.results FILE`."""

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dist.errors import UserError

COLUMNS = (
    "hardware", "threads", "load", "processes", "torch", "transformers", "peft",
    "model", "data", "engine", "precision", "batch", "accumulation", "workers",
    "images_per_second", "step_images_per_second", "loader_images_per_second", "data_wait",
    "gflops_per_second", "gemm_gflops_per_second", "mfu", "forward_images_per_second", "lora_costs", "exchange",
    "peak_memory_mb", "checkpoint_seconds", "checkpoint_mb",
    "rounds", "our_images_per_second", "trainer_images_per_second", "faster_than_trainer", "lowest", "highest",
    "our_memory_mb", "trainer_memory_mb", "memory_of_trainer",
)  # fmt: skip


def require_appendable(path: Path) -> None:
    """Raises a `UserError` unless a row can be appended to the file. Does not create the file."""
    new = not path.exists()
    try:
        with path.open("a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            found = next(csv.reader(file), None)
        if new:
            path.unlink()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--csv {path}: cannot append to the file: {error}") from error
    if found is not None and tuple(found) != COLUMNS:
        raise UserError(f"--csv {path}: the file has other columns; use another file")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Appends results to the file. Rounds numbers to four digits and leaves missing values empty."""
    new = not path.exists() or not path.stat().st_size
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()})


def table(path: Path) -> str:
    """Markdown table of the newest row per hardware, model, data, engine, number of processes and precision."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = {
            (row["hardware"], row["model"], row["data"], row["engine"], row["processes"], row["precision"]): row
            for row in csv.DictReader(file)
        }
    lines = [
        "| model, batch, launch | images/s | step alone | loader alone | MFU | LoRA costs | memory | over `Trainer` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_line, rows.values())])


def _line(row: Mapping[str, str]) -> str:
    precision = "fp32" if row["precision"] == "no" else row["precision"]
    against = ""
    if row["faster_than_trainer"]:
        against = f"{row['faster_than_trainer']}x ({row['lowest']} to {row['highest']})"
        against += f", {row['memory_of_trainer']}x the memory"
    cells = (
        f"{row['model']}, {row['batch']} x {row['accumulation']}, {row['engine']}, {precision}",
        row["images_per_second"],
        row["step_images_per_second"],
        row["loader_images_per_second"],
        f"{float(row['mfu']):.0%}",
        f"{row['lora_costs']}x" if row["lora_costs"] else "",
        f"{float(row['peak_memory_mb']):,.0f} MiB",
        against,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
