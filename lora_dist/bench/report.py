"""The results of a benchmark as text, and as a row of the CSV file."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_dist.bench.compare import Comparison
from lora_dist.bench.diagnosis import Hardware, diagnose
from lora_dist.bench.measure import Measurements
from lora_dist.data.loader import workers_of
from lora_dist.engines.engine import engine_name
from lora_dist.processes.cores import cores_per_process
from lora_dist.processes.runtime import environment
from lora_dist.training.run import TrainingRun


def lines(run: TrainingRun, measured: Measurements, comparison: Comparison | None) -> Iterator[str]:
    """Yields one line per result, and the diagnosis last."""
    yield (
        f"images/s    {measured.images_per_second:.4g} (step alone {measured.step_images_per_second:.4g}, loader alone "
        f"{measured.loader_images_per_second:.4g}); waiting for data takes {measured.data_wait:.1%} of an update"
    )
    yield (
        f"compute     {measured.gflops_per_second:,.4g} GFLOP/s per process, {measured.mfu:.0%} of the "
        f"{measured.gemm_gflops_per_second:,.4g} GFLOP/s of large matrix products"
    )
    if measured.forward_images_per_second is not None:
        yield f"forward     {measured.forward_images_per_second:.4g} images/s without LoRA"
    if measured.lora_costs is not None:
        yield f"LoRA        {measured.lora_costs:.3f}x the time of forward and backward without LoRA"
    yield f"memory      {measured.peak_memory_mb:,.0f} MiB per process at the peak"
    yield f"checkpoint  {measured.checkpoint_mb:.4g} MB in {measured.checkpoint_seconds:.3g} s"
    if comparison is not None:
        yield (
            f"comparison  {comparison.our_images_per_second:.4g} images/s and {comparison.our_memory_mb:,.0f} MiB; "
            f"Trainer: {comparison.trainer_images_per_second:.4g} images/s and "
            f"{comparison.trainer_memory_mb:,.0f} MiB; {comparison.faster_than_trainer:.3f}x the speed "
            f"({comparison.lowest:.3f} to {comparison.highest:.3f} by round), "
            f"{comparison.memory_of_trainer:.3f}x the memory"
        )
    accelerator = run.engine.accelerator
    workers = workers_of(run.settings.data, accelerator.device)
    threads = torch.get_num_threads() if accelerator.device.type == "cpu" else 1
    idle = max(0, cores_per_process() - threads - workers)
    hardware = Hardware(accelerator.device.type, run.precision, accelerator.num_processes, workers, idle)
    yield diagnose(measured, run.settings, hardware)


def row(run: TrainingRun, measured: Measurements, comparison: Comparison | None, load: float) -> dict[str, Any]:
    """Values of `results.COLUMNS`; those that were not measured are None or missing.

    Args:
        load: Load average of the machine over the minute before the benchmark.
    """
    settings, accelerator = run.settings, run.engine.accelerator
    found = environment(accelerator)
    return {
        "hardware": found["device"],
        "threads": torch.get_num_threads(),
        "load": load,
        "processes": accelerator.num_processes,
        **{name: found["versions"][name] for name in ("torch", "transformers", "peft")},
        "model": _short(settings.model.model_name_or_path),
        "data": _short(settings.data.train_dir or settings.data.dataset_name or ""),
        "engine": engine_name(accelerator),
        "precision": run.precision,
        "batch": run.plan.per_device_batch,
        "accumulation": run.plan.accumulation,
        "workers": workers_of(settings.data, accelerator.device),
        **asdict(measured),
        "mfu": measured.mfu,
        **(comparison._asdict() if comparison else {}),
    }


def _short(name: str) -> str:
    """The last two parts of an existing path; other names are returned unchanged."""
    return "/".join(Path(name).parts[-2:]) if Path(name).exists() else name
