"""What a base in bf16 costs in accuracy: the demo's digits with three seeds, with --base_dtype float32 and bfloat16.

    PYTHONPATH=. python tests/benchmarks/base_dtype.py

A CPU without instructions for bf16 is hundreds of times slower in it. There, `--ways float32 rounded` measures a part
of the cost: the weights of the base are rounded to bf16, and everything is computed in fp32. Adds rows to
`results/base_dtype.csv`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from predict_speed import add_rows
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lora_dist.demo import local_path

BASE = "demo:vit"
SEEDS = (1, 2, 3)
WAYS = ("float32", "bfloat16", "rounded")


def rounded_base(directory: Path) -> Path:
    """Writes the base with weights rounded to bf16, as fp32."""
    model = AutoModelForImageClassification.from_pretrained(local_path(BASE))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model.save_pretrained(directory)
    AutoImageProcessor.from_pretrained(local_path(BASE)).save_pretrained(directory)
    return directory


def accuracy(root: Path, way: str, seed: int, epochs: int) -> float:
    """Held-out accuracy of a run."""
    output = root / f"{way}-{seed}"
    settings = {"config": "demo", "output_dir": output, "seed": seed, "num_train_epochs": epochs, "eval_steps": "no"}
    if way == "rounded":
        settings |= {"model_name_or_path": root / "rounded"}
    else:
        settings |= {"base_dtype": way}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run([sys.executable, "-m", "lora_dist.train", *arguments], check=True, capture_output=True)
    return float(json.loads((output / "all_results.json").read_text(encoding="utf-8"))["eval_accuracy"])


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
            found = [accuracy(root, way, seed, arguments.epochs) for seed in SEEDS]
            row: dict[str, object] = {"base": way, "epochs": arguments.epochs, "mean": round(mean(found), 4)}
            rows.append(row | {f"seed_{seed}": round(one, 4) for seed, one in zip(SEEDS, found, strict=True)})
            print(rows[-1], flush=True)
    add_rows("base_dtype.csv", rows)


if __name__ == "__main__":
    main()
