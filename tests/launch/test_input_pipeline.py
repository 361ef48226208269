"""The fast ways of input, through the command: cached by one process for all, and augmented on the device."""

from pathlib import Path

import pytest
from lora_dist_testing.launching import lines_of, run_flags, train
from lora_dist_testing.tiny import make_folder


def test_two_processes_share_a_cache_and_train_as_one(vit: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "train", per_class=24, size=(60, 50))
    make_folder(tmp_path / "validation", per_class=3, first=100)
    losses = {}
    runs = (
        ("two", "ddp_cpu.yaml", 4, ()),
        ("one", None, 8, ()),
        ("device", None, 8, ("--augment_on_device",)),
    )
    for name, launch_file, batch, more in runs:
        result = train(
            *run_flags(
                vit,
                tmp_path,
                tmp_path / name,
                per_device_train_batch_size=batch,
                num_train_epochs=2,
                logging_steps=1,
                lora_dropout=0,
                cache_dir=tmp_path / "cache",
                dataloader_num_workers=1,
            ),
            *more,
            launch_file=launch_file,
        )
        assert result.stderr.count("cached 72 images in") == int(name == "two")
        losses[name] = [line["train/loss"] for line in lines_of(tmp_path / name) if "train/loss" in line]
    assert len(losses["one"]) == 18
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert losses["device"] == pytest.approx(losses["one"], rel=1e-2)
    assert len(list((tmp_path / "cache").rglob("part-*.pixels"))) == 2
