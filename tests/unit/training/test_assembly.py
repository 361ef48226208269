"""A run is put together from settings that fit."""

from pathlib import Path

import pytest
from lora_dist_testing.launching import run_flags
from lora_dist_testing.tiny import make_folder

from lora_dist import train


def test_a_run_of_one_class_ends_before_it_trains(vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its result would give that class to every image, and is refused by prediction."""
    for split in ("train", "validation"):
        make_folder(tmp_path / split, ["rose"], 3)
    with pytest.raises(SystemExit):
        train.main(run_flags(vit, tmp_path, tmp_path / "out"))
    assert "the data has a single class, rose: there is nothing to classify" in capfd.readouterr().err
    assert not (tmp_path / "out" / "checkpoints").exists()
