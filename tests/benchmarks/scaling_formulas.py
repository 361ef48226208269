"""The numbers of docs/scaling.md, from formulas: bytes an update sends, when that matters, images that a node reads.

    PYTHONPATH=. python tests/benchmarks/scaling_formulas.py

Nothing of it was run on a GPU. `SPEED` is an assumption. The order of the samples is measured.
"""

import resource
import time
from typing import NamedTuple

from lora_dist.data.sampling.order import BatchPlan, ShuffledOrder

CLASSES = 101
RANK = 16
SPEED = 250e12
"""Floating-point operations a second of a GPU in training: an assumption, about a quarter of an H100's peak in bf16."""
GPUS = 8
BATCH = 64
"""Images of a GPU in an update."""
GIGABITS = (25, 100, 400)
"""A second, of the network of a node."""
JPEG_BYTES = 110e3
CACHED_BYTES = 256 * 256 * 3
PROCESSES, SAMPLES = 1024, 10_000_000
"""Of the order that is measured."""
PER_CORE = {"JPEG": 500, "cache": 2647, "cache, augmented on the device": 6191}
"""Images a second that a core prepares, measured: docs/benchmarks.md#input."""


class Size(NamedTuple):
    """A ViT with patches of 16 at 224 pixels: width, layers, millions of parameters and GFLOP of a forward pass."""

    width: int
    layers: int
    parameters: float
    forward: float


SIZES = {"ViT-S": Size(384, 12, 21.7, 9.2), "ViT-B": Size(768, 12, 85.9, 35.2), "ViT-L": Size(1024, 24, 303.4, 123.1)}
TRAINED = ("head", "LoRA", "full")


def trained(size: Size, what: str) -> float:
    """Number of parameters that train."""
    head = (size.width + 1) * CLASSES
    lora = size.layers * 2 * 2 * size.width * RANK
    return {"head": head, "LoRA": head + lora, "full": size.parameters * 1e6}[what]


def operations(size: Size, what: str) -> float:
    """Floating-point operations of an image; backward takes as many for activations, and again for weights."""
    return {"head": 1, "LoRA": 2.05, "full": 3}[what] * size.forward * 1e9


def node_bytes(size: Size, what: str) -> float:
    """Bytes that a node sends in an update under DDP, on many nodes: each gradient in fp32, twice."""
    return 2 * 4 * trained(size, what)


def sending_share(size: Size, what: str, gigabits: float) -> float:
    """Share of an update of `BATCH` images a GPU that is sending, if sending overlaps with nothing."""
    sending = node_bytes(size, what) * 8 / (gigabits * 1e9)
    return sending / (sending + BATCH * operations(size, what) / SPEED)


def order_costs() -> str:
    """Time and memory of the order of an epoch, measured on one of many processes."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    plan = BatchPlan(ShuffledOrder(SAMPLES, seed=0), BATCH, 1, PROCESSES, PROCESSES - 1)
    next(plan.micro_batches(0))
    seconds = time.perf_counter() - start
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return f"{SAMPLES:,} samples, {PROCESSES:,} processes: {seconds:.1f} s and {kilobytes / 1024:.0f} MiB an epoch"


def main() -> None:
    """Prints both tables as Markdown, and the costs of the order."""
    print(f"| | trains | a node sends | {', '.join(map(str, GIGABITS))} Gbit/s |\n|---|---|---|---|")
    for name, size in SIZES.items():
        for what in TRAINED:
            shares = ", ".join(f"{sending_share(size, what, gigabits):.1%}" for gigabits in GIGABITS)
            number, sent = f"{trained(size, what):,.0f}", f"{node_bytes(size, what) / 1e6:,.1f} MB"
            print(f"| {name}, {what} | {number} | {sent} | {shares} |")
    print(f"\n| | images/s a node | JPEG | cache | {' | '.join(f'cores: {way}' for way in PER_CORE)} |")
    print(f"|---|---|---|---|{'---|' * len(PER_CORE)}")
    for name, size in SIZES.items():
        images = GPUS * SPEED / operations(size, "LoRA")
        read = f"{images * JPEG_BYTES / 1e9:.1f} GB/s | {images * CACHED_BYTES / 1e9:.1f} GB/s"
        cores = " | ".join(f"{images / rate:,.0f}" for rate in PER_CORE.values())
        print(f"| {name} | {images:,.0f} | {read} | {cores} |")
    print(f"\n{order_costs()}")


if __name__ == "__main__":
    main()
