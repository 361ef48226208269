"""Measures a run: the step alone, the loader alone, both together, and a checkpoint."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from lora_dist.bench.arithmetic import count_flops, measure_gemm, measure_passes
from lora_dist.data.batch import Batch
from lora_dist.data.loader import batches, train_loader, workers_of
from lora_dist.errors import Problems
from lora_dist.processes.watch import Watch
from lora_dist.settings.bench import BenchSettings
from lora_dist.training.assembly import assemble
from lora_dist.training.dry_run import time_updates
from lora_dist.training.reporting.throughput import ThroughputMeter, peak_memory_mb
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.output import Output
from lora_dist.training.saving.state import Progress


@dataclass(frozen=True)
class Figures:
    """What was measured. Rates are over all processes; what else differs is of the process that takes most.

    Attributes:
        images_per_second: of whole updates, loading included.
        step_images_per_second: of updates on batches that are on the device already.
        loader_images_per_second: of the loader, with nobody to wait for.
        data_wait: share of an update that is waiting for data.
        gflops_per_second: of the step, on a process.
        gemm_gflops_per_second: of a large matrix product in the same precision, on a process.
        forward_images_per_second: of the bare forward pass without LoRA; None where the model is in parts.
        lora_costs: time of forward and backward, over that without LoRA; None as well.
        exchange: share of a step that is neither forward nor backward: gradients on their way, and the optimizer.
        peak_memory_mb: of training, on the CUDA device, or of the process (2**20 bytes).
        checkpoint_seconds: to save one.
        checkpoint_mb: its size (10**6 bytes).
    """

    images_per_second: float
    step_images_per_second: float
    loader_images_per_second: float
    data_wait: float
    gflops_per_second: float
    gemm_gflops_per_second: float
    forward_images_per_second: float | None
    lora_costs: float | None
    exchange: float | None
    peak_memory_mb: float
    checkpoint_seconds: float
    checkpoint_mb: float

    @property
    def mfu(self) -> float:
        """The step's share of what matrix products reach."""
        return self.gflops_per_second / self.gemm_gflops_per_second


def assemble_unwritten(settings: BenchSettings, accelerator: Accelerator, directory: Path) -> TrainingRun:
    """The run, put together as training does it, but with nothing written outside `directory`."""
    unwritten = settings.model_copy(update={"run": settings.run.model_copy(update={"dry_run": True})})
    watch = Watch(settings.run.stall_timeout)
    return assemble(unwritten, accelerator, Output(directory), None, None, Problems(dry_run=False), watch).run


def warm_updates(workers: int, accumulation: int) -> int:
    """Updates after which every worker of the loader has delivered what it had prepared while nobody was waiting."""
    return 1 + -(-workers // accumulation)


def time_loaded(run: TrainingRun, updates: int) -> tuple[int, float, float]:
    """Makes updates as a run does, after some that warm up: their samples, seconds, and seconds of waiting for data."""
    steps = _steps(run, updates)
    meter = ThroughputMeter()
    stream = meter.timed(_stream(run, steps.stop))
    time_updates(run, range(steps.start), stream)
    meter.reset()
    seconds = sum(time_updates(run, steps, stream))
    return run.order.samples_before(steps.stop) - run.order.samples_before(steps.start), seconds, meter.waited


def _steps(run: TrainingRun, updates: int) -> range:
    """The updates that count."""
    warm = warm_updates(workers_of(run.settings.data, run.engine.accelerator.device), run.order.accumulation)
    return range(warm, warm + updates)


def _stream(run: TrainingRun, updates: int) -> Iterator[Batch]:
    """The batches of the first updates of a run, from a loader of their own."""
    run.images.close()
    device = run.engine.accelerator.device
    return batches(train_loader(run.images, run.order, 0, updates, run.settings.data, device), device)


def measure(run: TrainingRun, updates: int) -> Figures:
    """Measures a run that is ready to begin. Called on every process."""
    accelerator, order = run.engine.accelerator, run.order
    device = accelerator.device
    held = [batch.to(device) for batch in _stream(run, 1)]

    step = median(_time_held(run, held, updates + 1)[1:])
    samples, seconds, waited = time_loaded(run, updates)
    peak = peak_memory_mb(device)
    loading = _time_loader(run, updates)
    passes: tuple[float, float, float] | None = None
    if accelerator.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        passes = measure_passes(run, held[0], updates)
    saving, size = _time_checkpoint(run)
    achieved = count_flops(run, held) / step
    gemm = measure_gemm(device, accelerator.mixed_precision)

    step, seconds, waited, peak, loading = (
        max(gather_object([value])) for value in (step, seconds, waited / seconds, peak, loading)
    )
    images = len(held[0].labels) * order.world_size
    return Figures(
        images_per_second=samples / seconds,
        step_images_per_second=order.samples_in(0) / step,
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


def _time_held(run: TrainingRun, held: list[Batch], count: int) -> list[float]:
    """Seconds of updates that all take the same batches."""
    return [time_updates(run, range(1), iter(held))[0] for _ in range(count)]


def _time_loader(run: TrainingRun, updates: int) -> float:
    """Seconds of loading as many batches and doing nothing with them."""
    steps = _steps(run, updates)
    stream = _stream(run, steps.stop)
    for _ in range(sum(map(run.order.micro_batches_in, range(steps.start)))):
        next(stream)
    start = time.perf_counter()
    for _ in stream:
        pass
    return time.perf_counter() - start


def _time_checkpoint(run: TrainingRun) -> tuple[float, int]:
    """Seconds and bytes of a checkpoint."""
    start = time.perf_counter()
    run.checkpointer.save(Progress(step=1))
    seconds = time.perf_counter() - start
    return seconds, sum(file.stat().st_size for file in run.checkpointer.directory.rglob("*") if file.is_file())
