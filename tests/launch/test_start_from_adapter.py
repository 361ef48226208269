"""Runs that go on from an adapter, through real launchers: to other classes, on two processes, and after a stop."""

import json
from pathlib import Path

import pytest
import torch
from lora_dist_testing.launching import flags, predict, results_of, run_flags, train
from lora_dist_testing.tiny import make_folder
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def first(vit: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three classes, with a shape of LoRA that is not the default."""
    out = tmp_path_factory.mktemp("first") / "run"
    train(
        *run_flags(
            vit,
            photos,
            out,
            lora_r=4,
            lora_alpha=12,
            lora_target_modules="all-linear",
            lora_dropout=0,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_train_steps=4,
        )
    )
    return out


def test_a_run_goes_on_to_other_classes_and_is_itself_resumed(first: Path, tmp_path: Path) -> None:
    """With steps too small to move anything, what is handed over is the adapter that it began with, and a new head."""
    make_folder(tmp_path / "train", classes=("d", "e"), per_class=5, first=20)
    make_folder(tmp_path / "validation", classes=("d", "e"), per_class=2, first=50)
    arguments = flags(
        adapter_name_or_path=first / "adapter",
        train_dir=tmp_path / "train",
        validation_dir=tmp_path / "validation",
        output_dir=tmp_path / "run",
        learning_rate=1e-12,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
        checkpointing_steps=1,
    )
    result = train(*arguments, "--max_train_steps", 2, launch_file="ddp_cpu.yaml")
    assert "starting from the adapter" in result.stderr
    assert "with a new head" in result.stderr
    before = load_file(first / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if "classifier" in name:
            assert len(tensor) == 2
        else:
            torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    assert max(tensor.abs().max() for name, tensor in before.items() if "lora_B" in name) > 1e-3
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"continued from the adapter `{first / 'adapter'}`" in card
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    rows = predict("--adapter", tmp_path / "run" / "adapter", "--images", tmp_path / "validation").stdout.splitlines()
    assert {json.loads(row)["label"] for row in rows} <= {"d", "e"}
    # The same command goes on where it ended; with another start it is another run.
    resumed = train(*arguments, "--max_train_steps", 3, "--resume_from_checkpoint", "auto", launch_file="ddp_cpu.yaml")
    assert "resuming from" in resumed.stderr
    assert results_of(tmp_path / "run")["step"] == 3
    other = train(
        *arguments[2:],
        *flags(adapter_name_or_path=tmp_path / "run" / "adapter", max_train_steps=4, resume_from_checkpoint="auto"),
        code=2,
    )
    assert "start was" in other.stderr
