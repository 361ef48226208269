"""What LoRA's layers cost: a step with them against the same step whose backward runs through the frozen base alone.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/lora_costs.py --rounds 15

DINOv2-S with random weights, 112 px, batch 32, r = 16 on query and value, the head trained. The contenders take turns:
`base` is without LoRA, and its backward pass goes as far as LoRA's, to the first query and value; `peft` has PEFT's
layers and `lora_dist` this project's, with the dropout that the name says. A ratio is the median over rounds of what
stands in the same round. Adds a row a contender to `results/lora_costs.csv`.
"""

import argparse
import copy
import csv
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, Dinov2Config

from lora_dist.adapters import inject, without_lora
from lora_dist.config import LoraSettings

RESULTS = Path(__file__).parent / "results" / "lora_costs.csv"
HEAD = "classifier"


def make_base(image_size: int) -> Any:
    """DINOv2-S with 101 classes."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=image_size,
        patch_size=14,
        num_labels=101,
    )
    return AutoModelForImageClassification.from_config(config)


def with_lora(model: nn.Module, dropout: float, peft_layers: bool) -> nn.Module:
    """LoRA on query and value, by this project's layers or PEFT's."""
    adapted = inject(copy.deepcopy(model), LoraSettings(lora_dropout=dropout), [HEAD])
    if peft_layers:
        for module in adapted.modules():
            module.__dict__.pop("forward", None)
    return adapted


def step(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Seconds for one forward and backward pass."""
    began = time.perf_counter()
    cross_entropy(model(pixel_values=pixels).logits, labels).backward()
    took = time.perf_counter() - began
    model.zero_grad()
    return took


def main() -> None:
    """Turns, a table, rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=112)
    args = parser.parse_args()
    base = make_base(args.image_size)
    contenders = {"base": with_lora(base, 0.0, peft_layers=True)}
    for dropout in (0.0, 0.1):
        contenders[f"peft {dropout}"] = with_lora(base, dropout, peft_layers=True)
        contenders[f"lora_dist {dropout}"] = with_lora(base, dropout, peft_layers=False)
    for model in contenders.values():
        model.train()
    pixels = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    labels = torch.randint(0, 101, (args.batch_size,))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, model in contenders.items():
            with without_lora(model) if name == "base" else nullcontext():
                took = step(model, pixels, labels)
            if turn:  # the first one warms up
                times[name].append(took)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        if is_new:
            rows.writerow(["contender", "threads", "torch", "peft", "batch", "pixels", "rounds", "ms", "of_base"])
        for name, found in times.items():
            ratio = median(a / b for a, b in zip(found, times["base"], strict=True))
            size = [args.batch_size, args.image_size, args.rounds]
            ms = f"{median(found) * 1000:.0f}"
            rows.writerow(
                [name, torch.get_num_threads(), torch.__version__, peft.__version__, *size, ms, f"{ratio:.3f}"]
            )
            print(f"{name:15} {ms:>6} ms  {ratio:.3f} of the base", flush=True)


if __name__ == "__main__":
    main()
