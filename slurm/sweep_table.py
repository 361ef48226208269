"""Collects the results of a sweep: `python slurm/sweep_table.py GRID_FILE OUTPUT_DIR` prints and writes table.csv."""

import csv
import json
import shlex
import sys
from pathlib import Path
from typing import Any

METRICS = ("eval_macro_f1", "eval_loss", "best_step", "train_runtime")
OF_SEVERAL_LABELS = "eval_mAP"
"""Stands in the place of `eval_accuracy` in runs with --problem_type multi_label_classification."""


def grid_of(path: Path) -> list[dict[str, str]]:
    """Returns the flags of each run. Like sweep.sbatch, skips blank lines and comments."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [_flags(shlex.split(line)) for line in lines if line and not line.startswith("#")]


def _flags(words: list[str]) -> dict[str, str]:
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            flags[name] = value
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    # A flag alone switches something on.
    return {name: value or "true" for name, value in flags.items()}


def rows_of(grid: list[dict[str, str]], output_dir: Path) -> list[list[str]]:
    """Returns the header and one row per run; the results of unfinished runs are blank."""
    names = list(dict.fromkeys(name for flags in grid for name in flags))
    found = [_results(output_dir / str(number)) for number in range(1, len(grid) + 1)]
    several = any(OF_SEVERAL_LABELS in values for values in found)
    metrics = (OF_SEVERAL_LABELS if several else "eval_accuracy", *METRICS)
    return [
        ["run", *names, *metrics],
        *(
            [str(number), *(flags.get(name, "") for name in names), *(_shown(values.get(name)) for name in metrics)]
            for number, (flags, values) in enumerate(zip(grid, found, strict=True), start=1)
        ),
    ]


def _results(run: Path) -> dict[str, Any]:
    file = run / "all_results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def main(grid_file: str, output_dir: str) -> None:
    """Prints the table as Markdown and writes it as CSV."""
    rows = rows_of(grid_of(Path(grid_file)), Path(output_dir))
    with (Path(output_dir) / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    print("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python slurm/sweep_table.py GRID_FILE OUTPUT_DIR")
    main(sys.argv[1], sys.argv[2])
