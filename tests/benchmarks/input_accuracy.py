"""What the cache and augmentation on the device do to accuracy: the demo on enlarged digits, three seeds each way.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/input_accuracy.py

The digits are written as JPEGs of 96 x 96 pixels, of which the cache keeps 37 for a model that takes 32. Both ways
train with the same seeds, settings and order. Each run adds its rows to `results/input_accuracy.csv`.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from result_files import add_rows
from training_runs import accuracies, train

from lora_dist.demo import local_path

SIZE = (96, 96)


def write_digits(directory: Path) -> None:
    """Writes both splits of the demo's digits, enlarged."""
    for split in ("train", "validation"):
        source = Path(local_path(f"demo:digits/{split}"))
        for file in source.rglob("*.png"):
            target = directory / split / file.relative_to(source).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(target, quality=90)


def run(root: Path, epochs: int, more: dict[str, object], seed: int) -> dict[str, Any]:
    """Results of a run."""
    return train(
        root / f"run-{seed}-{len(more)}",
        config="demo",
        train_dir=root / "train",
        validation_dir=root / "validation",
        seed=seed,
        num_train_epochs=epochs,
        augmentation="basic",
        crop_scale_min=0.5,
        horizontal_flip=0,
        eval_steps="no",
        **more,
    )


def main() -> None:
    """Prints the accuracies of both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_digits(root)
        cached: dict[str, object] = {"cache_dir": root / "cache", "augment_on_device": "true"}
        for name, more in {"files": {}, "cache, augment_on_device": cached}.items():
            found = accuracies(partial(run, root, arguments.epochs, more))
            rows.append({"input": name, "epochs": arguments.epochs, **found})
            print(rows[-1], flush=True)
    add_rows("input_accuracy.csv", rows)


if __name__ == "__main__":
    main()
