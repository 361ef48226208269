"""What the cache and augmentation on the device do to accuracy: the demo on enlarged digits, three seeds each way.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/input_accuracy.py

The digits are written as JPEGs of 96 x 96 pixels, of which the cache keeps 37 for a model that takes 32. Both ways
train with the same seeds, settings and order. Each run adds its rows to `results/input_accuracy.csv`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from PIL import Image
from predict_speed import add_rows

from lora_dist.demo import local_path

SEEDS = (1, 2, 3)
SIZE = (96, 96)


def write_digits(directory: Path) -> None:
    """Writes both splits of the demo's digits, enlarged."""
    for split in ("train", "validation"):
        source = Path(local_path(f"demo:digits/{split}"))
        for file in source.rglob("*.png"):
            target = directory / split / file.relative_to(source).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(target, quality=90)


def accuracy(root: Path, seed: int, epochs: int, *more: str) -> float:
    """Held-out accuracy of a run."""
    output = root / f"run-{seed}-{len(more)}"
    settings = {
        "config": "demo",
        "train_dir": root / "train",
        "validation_dir": root / "validation",
        "output_dir": output,
        "seed": seed,
        "num_train_epochs": epochs,
        "augmentation": "basic",
        "crop_scale_min": 0.5,
        "horizontal_flip": 0,
        "eval_steps": "no",
    }
    arguments = [*(f"--{name}={value}" for name, value in settings.items()), *more]
    subprocess.run([sys.executable, "-m", "lora_dist.train", *map(str, arguments)], check=True, capture_output=True)
    return float(json.loads((output / "all_results.json").read_text(encoding="utf-8"))["eval_accuracy"])


def main() -> None:
    """Prints the accuracies of both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root)
        ways = {"files": (), "cache, augment_on_device": ("--cache_dir", str(root / "cache"), "--augment_on_device")}
        for name, flags in ways.items():
            found = [accuracy(root, seed, arguments.epochs, *flags) for seed in SEEDS]
            row: dict[str, object] = {"input": name, "epochs": arguments.epochs, "mean": round(mean(found), 4)}
            rows.append(row | {f"seed_{seed}": round(one, 4) for seed, one in zip(SEEDS, found, strict=True)})
            print(rows[-1], flush=True)
    add_rows("input_accuracy.csv", rows)


if __name__ == "__main__":
    main()
