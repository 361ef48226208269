"""Where the time of a training step goes on a CPU: a ViT-S with LoRA and dropout 0.1, by kind of operator.

    PYTHONPATH=. OMP_NUM_THREADS=2 python tests/benchmarks/step_profile.py

Random weights, 224 px, batch 32, r = 16 on query and value, the head trained. Profiles whole updates of one micro-batch
with torch.profiler, and prints each kind's share of the time of all operators, without the operators that these call.
"""

import argparse
import re
from collections import defaultdict

import torch
from predict_speed import make_classifier
from torch.profiler import ProfilerActivity, profile

from lora_dist.data.batch import Batch
from lora_dist.engines.engine import make_engine
from lora_dist.model.lora.injection import inject
from lora_dist.model.lora.trainable import set_training
from lora_dist.processes.huge_pages import restart_with_huge_pages
from lora_dist.processes.runtime import launch
from lora_dist.settings.train import LoraSettings, OptimizationSettings
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.problems.loss import Loss
from lora_dist.training.step import GradientAccumulator, make_update

KINDS = {
    "matrix products": r"^(mm|addmm|bmm|baddbmm|linear|mkldnn_linear)",
    "attention": r"attention",
    "GELU": r"gelu",
    "layer norms": r"layer_norm",
    "patch embedding": r"convolution",
    "dropout masks": r"^(random_|bernoulli_|le_)",
    "AdamW": r"^(sqrt|addcdiv|lerp|_foreach|_fused)",
    "additions, products, copies": r"^(add|addcmul|sub|mul|div|copy|cat|sum|fill|zero|clone)_?$",
}
"""Patterns of the names of operators; the first kind that fits counts."""


def kind_of(operator: str) -> str:
    """The kind of an operator, such as `aten::addmm`."""
    name = operator.partition("::")[2]
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def main() -> None:
    """Profiles and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--image_size", type=int, default=224)
    args = parser.parse_args()
    restart_with_huge_pages()  # as training does
    accelerator = launch("no")
    model = inject(make_classifier("vit_s", args.image_size).model, LoraSettings(), ["classifier"])
    settings = OptimizationSettings()
    optimizer = make_optimizer(model, settings, 1.0, ["classifier"])
    engine = make_engine(accelerator, model, optimizer, settings)
    set_training(engine.model)
    batch = Batch(
        pixel_values=torch.randn(args.batch_size, 3, args.image_size, args.image_size),
        labels=torch.randint(0, 101, (args.batch_size,)),
        weights=torch.ones(args.batch_size),
        indices=torch.arange(args.batch_size),
    )

    def update(step: int) -> None:
        gradient = GradientAccumulator(
            engine,
            micro_batch_count=1,
            total_weight=args.batch_size,
            learning_rate=1e-3,
            loss=Loss(),
            dropout_seed=(0, step),
        )
        make_update(gradient, iter([batch]), 1.0)

    update(0)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(1, args.updates + 1):
            update(step)
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    others: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if "::" in event.key:
            kind = kind_of(event.key)
            times[kind] += event.self_cpu_time_total
            calls[kind] += event.count
            if kind == "other":
                others[event.key] += event.self_cpu_time_total
    total = sum(times.values())
    print(f"{total / args.updates / 1e3:.0f} ms an update on {torch.get_num_threads()} threads")
    for kind in sorted(times, key=lambda kind: -times[kind]):
        print(f"| {kind} | {times[kind] / total:.1%} | {calls[kind] / args.updates:.0f} |")
    print("other:", ", ".join(sorted(others, key=lambda name: -others[name])[:8]))


if __name__ == "__main__":
    main()
