"""Batches that do not fit are made smaller, on all processes alike, and the updates stay the same."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lora_dist_testing.launching import ROOT, TIMEOUT, environment, flags, lines_of, train
from lora_dist_testing.tiny import make_folder, make_model

from lora_dist.training.batch_size import _sizes

LIMITED = """
import importlib, os, resource, sys
import torch
from lora_dist import train
# The JIT compiler of oneDNN, once it has been refused memory, makes no kernel any more.
torch.backends.mkldnn.enabled = False
place, rooms, *flags = sys.argv[1:]
module, _, name = place.rpartition(".")
module = importlib.import_module(module)
call, room = getattr(module, name), int(rooms.split(",")[int(os.environ.get("RANK", "0"))]) * 2**20

def limited(*arguments):
    before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (before + room, resource.RLIM_INFINITY))
    try:
        return call(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

setattr(module, name, limited)
train.main(flags)
"""
"""Trains, with so many MiB left to a rank in a function of a module: `MODULE.FUNCTION MIB,MIB … [flags]`."""


@pytest.mark.parametrize(
    ("batch", "accumulation", "sizes"),
    [(8, 1, [8, 4, 2, 1]), (6, 1, [6, 3, 1]), (5, 2, [5, 2, 1]), (1, 4, [1]), (12, 1, [12, 6, 3, 1])],
)
def test_smaller_batches_make_up_the_same_update(batch: int, accumulation: int, sizes: list[int]) -> None:
    assert _sizes(batch, accumulation) == sizes
    assert all(batch * accumulation % size == 0 for size in sizes)


def _limited(
    script: Path, place: str, rooms: str, *arguments: object, launcher: tuple[object, ...] = ()
) -> subprocess.CompletedProcess[str]:
    script.write_text(LIMITED, encoding="utf-8")
    return subprocess.run(
        [sys.executable, *map(str, [*launcher, script, place, rooms, *arguments])],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(PYTHONPATH=str(ROOT)),
        check=False,
    )


def test_all_go_by_the_process_with_the_least_room_and_train_as_if_nothing_had_been(vit: Path, tmp_path: Path) -> None:
    """A batch of 2,048 takes some 150 MiB; one process has room for half of it or less, the other for all."""
    make_folder(tmp_path / "photos", per_class=20)
    arguments = flags(
        model_name_or_path=vit,
        train_dir=tmp_path / "photos",
        gradient_accumulation_steps=1,
        max_train_steps=2,
        num_train_epochs=2,
        logging_steps=1,
        lora_dropout=0,
    )
    large = ("--per_device_train_batch_size", 2048, "--auto_batch_size")
    result = _limited(
        tmp_path / "limited.py",
        "lora_dist.training.batch_size._fits",
        "8000,60",
        *arguments,
        *large,
        *flags(output_dir=tmp_path / "two"),
        launcher=(
            "-m",
            "accelerate.commands.launch",
            *flags(config_file=ROOT / "accelerate_configs" / "ddp_cpu.yaml", main_process_port=0),
        ),
    )
    assert result.returncode == 0, result.stderr
    settings = yaml.safe_load((tmp_path / "two" / "config.yaml").read_text(encoding="utf-8"))
    size = settings["per_device_train_batch_size"]
    assert 16 <= size < 2048, size
    assert settings["gradient_accumulation_steps"] * size == 2048
    assert settings["per_device_eval_batch_size"] == min(32, size)
    assert result.stderr.count(f"batches of 2048 per process do not fit into memory: taking {size}") == 1
    train(*arguments, "--per_device_train_batch_size", 4096, "--output_dir", tmp_path / "one")
    losses = [
        [line["train/loss"] for line in lines_of(tmp_path / run) if "train/loss" in line] for run in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_no_room_for_an_evaluation_is_said_with_the_way_out(tmp_path: Path) -> None:
    """Of 120 images at a time, what one layer says of them takes 24 MB."""
    make_model(tmp_path / "vit", image_size=224)
    make_folder(tmp_path / "train", per_class=4)
    make_folder(tmp_path / "validation", per_class=40, first=100)
    arguments = flags(
        model_name_or_path=tmp_path / "vit",
        train_dir=tmp_path / "train",
        validation_dir=tmp_path / "validation",
        per_device_train_batch_size=4,
        max_train_steps=1,
        output_dir=tmp_path / "run",
        mixed_precision="no",
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=128,
    )
    result = _limited(tmp_path / "limited.py", "lora_dist.training.evaluation._logits", "20", *arguments)
    assert result.returncode == 2, result.stderr
    assert "error: out of memory in an evaluation: " in result.stderr
    assert "Lower --per_device_eval_batch_size, which is 128" in result.stderr
    assert "Traceback" not in result.stderr
