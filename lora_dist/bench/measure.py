"""Measures a run: the step alone, the loader alone, both together, FLOP/s, the cost of LoRA, and a checkpoint."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_dist.data.batch import Batch
from lora_dist.data.loader import workers_of
from lora_dist.errors import ErrorCollector
from lora_dist.model.lora.injection import without_lora
from lora_dist.processes.watch import Watch
from lora_dist.settings.bench import BenchSettings
from lora_dist.training.assembly import assemble
from lora_dist.training.dry_run import time_updates
from lora_dist.training.progress import Progress
from lora_dist.training.reporting.throughput import ThroughputMeter, peak_memory_mb
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.output import Output
from lora_dist.training.step import make_update

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_base": torch.bfloat16}
MATRIX_PRODUCTS = 10
MATRIX_SECONDS = 5.0
"""No matrix product starts after this time. A CPU may take longer for a single product in bf16."""


@dataclass(frozen=True)
class Measurements:
    """Results. Rates are over all processes; other values are of the slowest or largest process.

    `exchange` is the fraction of a step outside of forward and backward: communication and the optimizer.
    """

    images_per_second: float  # whole updates, including data loading
    step_images_per_second: float  # updates on batches that are already on the device
    loader_images_per_second: float
    data_wait: float  # fraction of an update
    gflops_per_second: float  # of the step, per process
    gemm_gflops_per_second: float  # of a large matrix product in the same precision, per process
    forward_images_per_second: float | None  # without LoRA; None for sharded models
    lora_costs: float | None  # time of forward and backward, relative to that without LoRA
    exchange: float | None
    peak_memory_mb: float  # MiB, on the CUDA device or of the process
    checkpoint_seconds: float
    checkpoint_mb: float  # MB

    @property
    def mfu(self) -> float:
        """Speed of the step as a fraction of the speed of matrix products."""
        return self.gflops_per_second / self.gemm_gflops_per_second


def assemble_unwritten(settings: BenchSettings, accelerator: Accelerator, directory: Path) -> TrainingRun:
    """Assembles the run as training does, but writes only to `directory`."""
    unwritten = settings.model_copy(update={"run": settings.run.model_copy(update={"dry_run": True})})
    watch = Watch(settings.run.stall_timeout, patient=settings.data.streaming)
    return assemble(unwritten, accelerator, Output(directory), None, None, ErrorCollector(dry_run=False), watch).run


def warmup_updates(workers: int, accumulation: int) -> int:
    """Number of updates after which every worker has delivered the batches that it prepared before the first update."""
    return 1 + -(-workers // accumulation)


def time_loaded(run: TrainingRun, updates: int) -> tuple[int, float, float]:
    """Runs updates after the warmup; returns their samples, seconds, and seconds of waiting for data."""
    steps = _steps(run, updates)
    meter = ThroughputMeter()
    stream = _stream(run, steps.stop, meter)
    time_updates(run, range(steps.start), stream)
    meter.reset()
    seconds = sum(time_updates(run, steps, stream))
    return run.plan.samples_before(steps.stop) - run.plan.samples_before(steps.start), seconds, meter.waited


def _steps(run: TrainingRun, updates: int) -> range:
    """The measured updates."""
    workers = workers_of(run.settings.data, run.engine.accelerator.device)
    warmup = warmup_updates(workers, run.plan.accumulation)
    return range(warmup, warmup + updates)


def _stream(run: TrainingRun, updates: int, meter: ThroughputMeter | None = None) -> Iterator[Batch]:
    """Batches of the first `updates` updates, from a new loader; `meter` counts the wait for it."""
    run.images.close()
    return run.stream(0, updates, meter.timed if meter else iter)


def measure(run: TrainingRun, updates: int) -> Measurements:
    """Measures a run that is ready to start. Called on every process."""
    accelerator, plan = run.engine.accelerator, run.plan
    device = accelerator.device
    held = [batch.to(device) for batch in _stream(run, 1)]

    step = median([time_updates(run, range(1), iter(held))[0] for _ in range(updates + 1)][1:])
    samples, seconds, waited = time_loaded(run, updates)
    peak = peak_memory_mb(device)
    loading = _time_loader(run, updates)
    passes: tuple[float, float, float] | None = None
    if accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        passes = _time_passes(run, held[0], updates)
    start = time.perf_counter()
    run.checkpointer.save(Progress(step=1))
    saving = time.perf_counter() - start
    size = sum(file.stat().st_size for file in run.checkpointer.directory.rglob("*") if file.is_file())
    achieved = count_flops(run, held) / step
    gemm = _gemm_flops_per_second(device, run.precision)

    step, seconds, waited, peak, loading = (
        max(gather_object([value])) for value in (step, seconds, waited / seconds, peak, loading)
    )
    images = len(held[0].labels) * plan.world_size
    return Measurements(
        images_per_second=samples / seconds,
        step_images_per_second=plan.samples_in(0) / step,
        loader_images_per_second=samples / loading,
        data_wait=waited,
        gflops_per_second=achieved / 1e9,
        gemm_gflops_per_second=gemm / 1e9,
        forward_images_per_second=images / passes[2] if passes else None,
        lora_costs=passes[0] / passes[1] if passes and run.settings.model.tuning == "lora" else None,
        exchange=max(0.0, 1 - len(held) * passes[0] / step) if passes else None,
        peak_memory_mb=peak,
        checkpoint_seconds=saving,
        checkpoint_mb=size / 1e6,
    )


def _time_loader(run: TrainingRun, updates: int) -> float:
    """Seconds to load the batches of the measured updates, without training."""
    steps = _steps(run, updates)
    stream = _stream(run, steps.stop)
    for _ in range(sum(map(run.plan.micro_batches_in, range(steps.start)))):
        next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def count_flops(run: TrainingRun, micro_batches: Sequence[Batch]) -> int:
    """Floating-point operations of an update on this process; a multiply-add counts as two.

    The counter sees dispatched operators, so the model runs in eager mode. It counts fused attention on CUDA only. On
    other devices, attention is computed unfused, and its scores take gigabytes.
    """
    plain = torch.compiler.set_stance("force_eager")
    cuda = run.engine.accelerator.device.type == "cuda"
    attention = nullcontext() if cuda else sdpa_kernel(SDPBackend.MATH)
    with plain, attention, FlopCounterMode(display=False) as counter:
        make_update(run.begin_update(0), iter(micro_batches), run.settings.optimization.max_grad_norm)
    return counter.get_total_flops()


def _gemm_flops_per_second(device: torch.device, precision: str) -> float:
    """FLOP/s of the fastest of several products of large square matrices."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device, dtype=DTYPES[precision])
    left @ right
    times: list[float] = []
    while len(times) < MATRIX_PRODUCTS and sum(times) < MATRIX_SECONDS:
        times.append(_seconds(lambda: left @ right, device))
    return 2 * size**3 / min(times)


def _time_passes(run: TrainingRun, batch: Batch, rounds: int) -> tuple[float, float, float]:
    """Median seconds per micro-batch: forward and backward; the same without LoRA; forward without LoRA.

    The model must not be sharded. Nothing is communicated and no weight changes.
    """
    model, device = run.engine.unwrapped, run.engine.accelerator.device

    def forward() -> torch.Tensor:
        return run.loss.of_samples(model(pixel_values=batch.pixel_values).logits.float(), batch).sum()

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
