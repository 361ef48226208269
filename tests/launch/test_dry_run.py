"""A dry run says what a run will be, and all that speaks against it, and writes nothing."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from lora_dist_testing.launching import flags, lines_of, run_flags, train


def _arguments(vit: Path, photos: Path, out: Path) -> list[object]:
    return run_flags(
        vit,
        photos,
        out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        logging_steps=1,
        checkpointing_steps=1,
    )


def test_a_dry_run_foretells_the_run_and_writes_nothing(vit: Path, photos: Path, tmp_path: Path) -> None:
    arguments = _arguments(vit, photos, tmp_path / "run")
    plan = train(*arguments, "--dry_run", "--cache_dir", tmp_path / "cache", launch_file="ddp_cpu.yaml")
    assert not list(tmp_path.iterdir())
    settings, _, text = plan.stdout.partition("\n\n")
    assert yaml.safe_load(settings)["per_device_train_batch_size"] == 4
    assert "27 training and 9 validation images" in text
    assert "2 processes on" in text
    assert "6 of 16 samples: 4 per process x 2 accumulated x 2 processes; 2 per epoch" in text
    assert "2 x [16, 32]  vit.layers.*.attention.q_proj.lora_A" in text
    assert "1 x [3, 32]  classifier" in text
    assert "4 evaluations" in text
    assert "nothing was written" in plan.stderr
    train(*arguments, launch_file="ddp_cpu.yaml")
    foretold = float(re.search(r"memory +([\d,]+) MiB", text)[1].replace(",", ""))  # type: ignore[index]
    measured = max(line["train/peak_memory_mb"] for line in lines_of(tmp_path / "run") if "train/loss" in line)
    assert foretold == pytest.approx(measured, rel=0.15)
    whole = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    size = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
    assert float(re.search(r"checkpoints of (\d+) kB", text)[1]) == pytest.approx(size / 1000, rel=0.15)  # type: ignore[index]


def test_a_dry_run_says_all_that_speaks_against_the_run(vit: Path, photos: Path, tmp_path: Path) -> None:
    """A directory that is in use, and no token for the Hub."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    before = (tmp_path / "run").stat().st_mtime_ns
    result = train(*_arguments(vit, photos, tmp_path / "run"), "--dry_run", "--push_to_hub", code=2)
    assert "this run would not start:" in result.stderr
    assert "is not empty" in result.stderr
    assert "--push_to_hub: HF_HUB_OFFLINE is set" in result.stderr
    assert "memory" in result.stdout, "the plan stands there all the same"
    assert (tmp_path / "run").stat().st_mtime_ns == before


def test_a_dry_run_that_cannot_go_on_says_all_that_it_found(photos: Path, tmp_path: Path) -> None:
    """A directory that is in use, data without images, and a model that is none."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    result = train(
        *_arguments(tmp_path / "model", photos, tmp_path / "run"),
        *flags(train_dir=tmp_path / "data", dry_run=True),
        code=2,
    )
    parts = (
        "this run would not start:",
        "is not empty",
        f"{tmp_path / 'data'}: no images",
        "cannot load the base model",
    )
    for part in (*parts, "--train_dir was given twice; the last value counts"):
        assert result.stderr.count(part) == 1, f"{part}\n{result.stderr}"


def test_a_dry_run_whose_update_fails_says_what_it_found_before(vit: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    bad = tmp_path / "train" / "a"
    shutil.copytree(photos / "train", tmp_path / "train")
    for path in bad.iterdir():
        path.write_bytes(b"no image")
    arguments = _arguments(vit, photos, tmp_path / "run")
    result = train(*arguments, "--train_dir", tmp_path / "train", "--dry_run", code=2)
    assert "this run would not start:" in result.stderr
    assert "is not empty" in result.stderr
    assert f"{bad}" in result.stderr
