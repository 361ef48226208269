"""Writes the artifacts of this directory with the code of an older commit; README.md has the commands."""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from old_adapters import logits
from tiny import make_folder
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessor

from lora_dist import train
from lora_dist.model.trained.bundle import load_classifier

IMAGE_TIME = 1_700_000_000


def main():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    # Large weights, so that logits depend on what the attention does.
    config.initializer_range = 0.3
    AutoModelForImageClassification.from_config(config).save_pretrained("base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("base")
    make_folder(Path("photos/train"), classes=("a", "b"), per_class=6, size=(24, 20))
    make_folder(Path("photos/validation"), classes=("a", "b"), per_class=2, size=(24, 20), first=100)
    for image in Path("photos").rglob("*.png"):
        os.utime(image, (IMAGE_TIME, IMAGE_TIME))

    settings = {
        "model_name_or_path": "base",
        "train_dir": "photos/train",
        "validation_dir": "photos/validation",
        "output_dir": "run",
        "cache_dir": "cache",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "mixed_precision": "no",
        "max_train_steps": 4,
        "eval_steps": 2,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "lora_r": 2,
        "lora_target_modules": "query,value",
        "lora_dropout": 0,
        "dataloader_num_workers": 0,
    }
    sys.argv[1:] = [f"--{name}={value}" for name, value in settings.items()]
    train.main()

    run, adapter = Path("run"), Path("adapter")
    (run / "adapter").rename(adapter)
    expected = {"logits": logits(load_classifier(adapter).model).tolist()}
    (adapter / "expected.json").write_text(json.dumps(expected) + "\n")
    # The run as it was after two updates.
    shutil.rmtree(run / "tensorboard")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    for name in ("all_results.json", "evaluation.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    for lock in Path("cache").glob("*/lock"):
        lock.unlink()


if __name__ == "__main__":
    main()
