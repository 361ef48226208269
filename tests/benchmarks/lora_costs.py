"""What LoRA's layers cost: a step with them against the same step whose backward runs through the frozen base alone.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/lora_costs.py

DINOv2-S with random weights, 112 px, batch 32, r = 16 on query and value, the head trained. The contenders take turns:
`base` is without LoRA, and its backward pass goes as far as LoRA's, to the first query and value; `peft` has PEFT's
layers and `lora_dist` this project's, with the dropout that the name says. A ratio is the median over rounds of what
stands in the same round. Adds a row a contender to `results/lora_costs.csv`.
"""

import argparse
import copy
import os
import time
from contextlib import nullcontext
from statistics import median

import peft
import torch
from predict_speed import make_classifier
from result_files import add_rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_dist.model.lora.injection import inject, without_lora
from lora_dist.processes.huge_pages import restart_with_huge_pages
from lora_dist.settings.train import LoraSettings

HEAD = "classifier"


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
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=112)
    args = parser.parse_args()
    restart_with_huge_pages()  # as training does
    base = make_classifier("dinov2_s", args.image_size).model
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
    conditions: dict[str, object] = {
        "batch": args.batch_size,
        "pixels": args.image_size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "rounds": args.rounds,
        "torch": torch.__version__,
        "peft": peft.__version__,
    }
    rows = []
    for name, found in times.items():
        ratios = [own / base for own, base in zip(found, times["base"], strict=True)]
        figures = {"contender": name, "ms": round(1000 * median(found)), "of_base": round(median(ratios), 3)}
        rows.append(conditions | figures | {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)})
        print(*(f"{value:>15}" for value in list(rows[-1].values())[len(conditions) :]))
    add_rows("lora_costs.csv", rows)


if __name__ == "__main__":
    main()
