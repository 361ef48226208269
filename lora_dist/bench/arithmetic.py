"""The arithmetic of an update, what the device can do of it, and what LoRA adds."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_dist.data.batch import Batch
from lora_dist.model.adapters import without_lora
from lora_dist.training.run import TrainingRun
from lora_dist.training.step import batch_loss, make_update

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = 10
PATIENCE = 5.0
"""Seconds after which no further matrix product is made: a CPU may take that long for one in bf16."""


def count_flops(run: TrainingRun, micro_batches: Sequence[Batch]) -> int:
    """Floating-point operations of an update on this process: a multiplication and an addition are two.

    Counted where they are dispatched, so nothing may be compiled, and attention is made of its two products.
    """
    plain = torch.compiler.set_stance("force_eager")
    with plain, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make_update(run.begin_update(0), iter(micro_batches), run.settings.optimization.max_grad_norm)
    return counter.get_total_flops()


def measure_gemm(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of some products of large square matrices: what this device can do in this precision."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    left @ right
    times: list[float] = []
    while len(times) < PRODUCTS and sum(times) < PATIENCE:
        times.append(_seconds(lambda: left @ right, device))
    return 2 * size**3 / min(times)


def measure_passes(run: TrainingRun, batch: Batch, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a pass over a micro-batch: forward and backward; the same without LoRA; forward without LoRA.

    On a model that this process has whole. The three take turns; nothing is exchanged and no weight changes.
    """
    model, device = run.engine.unwrapped, run.engine.accelerator.device
    smoothing = run.settings.augmentation.label_smoothing_factor

    def forward() -> torch.Tensor:
        return batch_loss(model(pixel_values=batch.pixel_values).logits.float(), batch, smoothing).sum()

    def both() -> None:
        forward().backward()
        model.zero_grad()

    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(rounds + 1):
        times[0].append(_seconds(both, device))
        with without_lora(model):
            times[1].append(_seconds(both, device))
            with torch.no_grad():
                times[2].append(_seconds(forward, device))
    with_lora, without, forward_alone = (median(found[1:]) for found in times)
    return with_lora, without, forward_alone


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
