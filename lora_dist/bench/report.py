"""Figures for people, with the verdict, and as a row for the file."""

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_dist.bench.compare import Comparison
from lora_dist.bench.diagnosis import Circumstances, diagnose
from lora_dist.bench.measure import Figures
from lora_dist.data.loader import workers_of
from lora_dist.engines.engine import engine_name
from lora_dist.processes.runtime import environment
from lora_dist.training.run import TrainingRun


def lines(run: TrainingRun, figures: Figures, comparison: Comparison | None) -> Iterator[str]:
    """What was measured, a line a thing, and last the verdict."""
    yield (
        f"images/s    {figures.images_per_second:.4g}; the step alone {figures.step_images_per_second:.4g}, "
        f"the loader alone {figures.loader_images_per_second:.4g}; {figures.data_wait:.1%} of an update is waiting"
    )
    yield (
        f"arithmetic  {figures.gflops_per_second:,.4g} GFLOP/s a process, {figures.mfu:.0%} of the "
        f"{figures.gemm_gflops_per_second:,.4g} of large matrix products"
    )
    if figures.forward_images_per_second is not None:
        yield f"forward     {figures.forward_images_per_second:.4g} images/s, alone and without LoRA"
    if figures.lora_costs is not None:
        yield f"LoRA        {figures.lora_costs:.3f}x the time of a forward and backward pass without it"
    yield f"memory      {figures.peak_memory_mb:,.0f} MiB a process at its peak"
    yield f"checkpoint  {figures.checkpoint_mb:.4g} MB in {figures.checkpoint_seconds:.3g} s"
    if comparison is not None:
        ours, trainer = comparison.ours, comparison.trainer
        yield (
            f"in turns    {ours.images_per_second:.4g} images/s and {ours.peak_memory_mb:,.0f} MiB; the guide's recipe "
            f"on Trainer {trainer.images_per_second:.4g} and {trainer.peak_memory_mb:,.0f}: {comparison.faster:.3f}x "
            f"the speed ({comparison.lowest:.3f} to {comparison.highest:.3f} by round), {comparison.memory:.3f}x the "
            f"memory"
        )
    yield diagnose(figures, run.settings, circumstances(run))


def circumstances(run: TrainingRun) -> Circumstances:
    """Of this launch."""
    accelerator = run.engine.accelerator
    workers = workers_of(run.settings.data, accelerator.device)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    computing = torch.get_num_threads() if accelerator.device.type == "cpu" else 1
    return Circumstances(
        accelerator.device.type,
        accelerator.mixed_precision,
        accelerator.num_processes,
        workers,
        max(0, cores - computing - workers),
    )


def row(run: TrainingRun, figures: Figures, comparison: Comparison | None, load: float) -> dict[str, Any]:
    """By `results.COLUMNS`; what was not measured is None.

    Args:
        run: that was measured.
        figures: of it.
        comparison: with `Trainer`.
        load: of the machine over the minute before.
    """
    settings, accelerator = run.settings, run.engine.accelerator
    found = environment(accelerator)
    measured = asdict(figures) | {"mfu": figures.mfu}
    compared: dict[str, Any] = {}
    if comparison is not None:
        compared = {
            "rounds": comparison.rounds,
            "our_images_per_second": comparison.ours.images_per_second,
            "trainer_images_per_second": comparison.trainer.images_per_second,
            "faster_than_trainer": comparison.faster,
            "lowest": comparison.lowest,
            "highest": comparison.highest,
            "our_memory_mb": comparison.ours.peak_memory_mb,
            "trainer_memory_mb": comparison.trainer.peak_memory_mb,
            "memory_of_trainer": comparison.memory,
        }
    return {
        "hardware": found["device"],
        "threads": torch.get_num_threads(),
        "load": load,
        "processes": accelerator.num_processes,
        **{name: found["versions"][name] for name in ("torch", "transformers", "peft")},
        "model": _short(settings.model.model_name_or_path),
        "data": _short(settings.data.train_dir or settings.data.dataset_name or ""),
        "engine": engine_name(accelerator),
        "precision": accelerator.mixed_precision,
        "batch": run.order.per_device_batch,
        "accumulation": run.order.accumulation,
        "workers": workers_of(settings.data, accelerator.device),
        **measured,
        **compared,
    }


def _short(name: str) -> str:
    """The name of a directory without where it is."""
    return "/".join(Path(name).parts[-2:]) if Path(name).exists() else name
