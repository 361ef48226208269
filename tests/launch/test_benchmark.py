"""A benchmark is launched like training: results, diagnosis, a CSV row, and the comparison with the PEFT guide."""

import csv
from pathlib import Path

import pytest
from lora_dist_testing.launching import run, run_flags

from lora_dist.bench.results import COLUMNS


def _arguments(vit: Path, photos: Path, out: Path) -> list[object]:
    return run_flags(vit, photos, out / "run", updates=2, csv=out / "bench.csv")


def test_a_benchmark_compares_says_one_sentence_and_adds_a_row(vit: Path, photos: Path, tmp_path: Path) -> None:
    arguments = [*_arguments(vit, photos, tmp_path), "--compare", "trainer", "--rounds", 1]
    result = run("lora_dist.bench", *arguments)
    said = result.stdout.splitlines()
    assert said[-1].startswith("Bottleneck: ")
    assert any(line.startswith("comparison") for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["bench.csv"]
    with (tmp_path / "bench.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == COLUMNS
    assert (row["processes"], row["engine"], row["precision"], row["batch"]) == ("1", "single", "no", "8")
    measured = {name: float(row[name]) for name in COLUMNS[COLUMNS.index("images_per_second") :]}
    assert all(value > 0 for name, value in measured.items() if name != "exchange")
    assert measured["faster_than_trainer"] == measured["lowest"] == measured["highest"]


@pytest.mark.parametrize("compare", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_are_measured_together(compare: bool, vit: Path, photos: Path, tmp_path: Path) -> None:
    """And compared: the processes of one measurement form their own process group."""
    more = ("--compare", "trainer", "--rounds", 1) if compare else ()
    run("lora_dist.bench", *_arguments(vit, photos, tmp_path), *more, launch_file="ddp_cpu.yaml")
    with (tmp_path / "bench.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["processes"], row["engine"]) == ("2", "ddp")
    assert float(row["exchange"]) >= 0
    assert bool(row["trainer_images_per_second"]) == compare
    assert not compare or float(row["trainer_images_per_second"]) > 0
