"""The best is measured anew before the first update on a sharded model, which then trains on as if it had not been."""

import shutil
from pathlib import Path

import torch
from lora_dist_testing.launching import results_of, run_flags, train
from safetensors.torch import load_file

from lora_dist.train import main


def test_a_sharded_model_is_put_back_to_the_bit(vit: Path, photos: Path, tmp_path: Path) -> None:
    """From a checkpoint of a single process, which goes on to the same weights to float error."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    common = {
        "eval_steps": 1,
        "checkpointing_steps": 1,
        "save_total_limit": 99,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "lora_dropout": 0,
        "max_train_steps": 5,
    }
    main(run_flags(vit, photos, whole, **common, metric_for_best_model="loss"))
    for step in (1, 2, 3):
        shutil.copytree(whole / "checkpoints" / f"step-{step:08d}", out / "checkpoints" / f"step-{step:08d}")
    result = train(
        *run_flags(vit, photos, out, **common, per_device_train_batch_size=4, resume_from_checkpoint="auto"),
        launch_file="fsdp2_cpu.yaml",
    )
    assert "was selected by loss" in result.stderr
    assert results_of(out)["step"] == 5
    for step, tolerance in ((3, 0), (5, 1e-5)):
        for name in ("trained.safetensors", "optimizer.safetensors"):
            found, expected = (load_file(root / "checkpoints" / f"step-{step:08d}" / name) for root in (out, whole))
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=0, atol=tolerance)
