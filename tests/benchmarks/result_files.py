"""The files in `results/`, to which benchmarks add rows."""

import csv
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def add_rows(name: str, rows: Sequence[dict[str, object]], anew: bool = False) -> None:
    """Adds rows to a file of results, or writes it anew."""
    path = RESULTS / name
    new = anew or not path.exists()
    with path.open("w" if new else "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
