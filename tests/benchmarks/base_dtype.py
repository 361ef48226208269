"""What a base in bf16 costs in accuracy: the demo's digits with three seeds, with --base_dtype float32 and bfloat16.

    PYTHONPATH=. python tests/benchmarks/base_dtype.py

A CPU needs instructions for bf16 (`avx512_bf16`), or is hundreds of times slower in it. Without them,
`--ways float32 rounded` measures a part of the cost: the weights of the base are rounded to bf16, and everything is
computed in fp32. Adds rows to `results/base_dtype.csv`.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from result_files import add_rows
from training_runs import accuracies, train
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lora_dist.demo import local_path

BASE = "demo:vit"
WAYS = ("float32", "bfloat16", "rounded")


def rounded_base(directory: Path) -> Path:
    """Writes the base with weights rounded to bf16, as fp32."""
    model = AutoModelForImageClassification.from_pretrained(local_path(BASE))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model.save_pretrained(directory)
    AutoImageProcessor.from_pretrained(local_path(BASE)).save_pretrained(directory)
    return directory


def run(root: Path, way: str, epochs: int, seed: int) -> dict[str, Any]:
    """Results of a run."""
    base: dict[str, object] = {"model_name_or_path": root / "rounded"} if way == "rounded" else {"base_dtype": way}
    return train(root / f"{way}-{seed}", config="demo", seed=seed, num_train_epochs=epochs, eval_steps="no", **base)


def main() -> None:
    """Prints the accuracies of each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:2])
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rounded_base(root / "rounded")
        for way in arguments.ways:
            found = accuracies(partial(run, root, way, arguments.epochs))
            rows.append({"base": way, "epochs": arguments.epochs, **found})
            print(rows[-1], flush=True)
    add_rows("base_dtype.csv", rows)


if __name__ == "__main__":
    main()
