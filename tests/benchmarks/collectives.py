"""Counts collective calls and reads of tensors in an update and in an evaluation of the demo, on two CPU processes.

    accelerate launch --config_file accelerate_configs/ddp_cpu.yaml tests/benchmarks/collectives.py

Prints a line of JSON: for an update of one micro-batch and for an evaluation, the number of calls by kind, as gloo
reports them to the profiler, and the number of reads, each of which would wait for a GPU.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from device_reads import Reads
from torch.profiler import ProfilerActivity, profile

from lora_dist.bench.measure import assemble_unwritten
from lora_dist.engines.engine import engine_name
from lora_dist.gpu_check.small_run import run_flags
from lora_dist.processes.runtime import launch
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.cli import parse
from lora_dist.training.dry_run import time_updates
from lora_dist.training.run import TrainingRun


def calls(work: Callable[[], object]) -> dict[str, int]:
    """Number of collective calls by kind, and of reads."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, Reads() as reads:
        work()
    counted = Counter(event.name for event in profiler.events() if event.name.startswith("gloo:"))
    found = {name.removeprefix("gloo:"): number for name, number in sorted(counted.items())}
    return found | {"reads": len(reads.where)}


def main() -> None:
    """Counts for an update with one micro-batch, and for an evaluation."""
    accelerator = launch("no")
    with tempfile.TemporaryDirectory() as directory:
        flags = run_flags(Path(directory))
        settings = parse(BenchSettings, flags, prog="collectives", description="", contradictions=contradictions)
        run: TrainingRun = assemble_unwritten(settings, accelerator, Path(directory))
        batches = list(run.stream(0, 3))
        time_updates(run, range(2), iter(batches[:2]))  # DDP arranges its buckets in the second one.
        found = {
            "an update": calls(lambda: time_updates(run, range(2, 3), iter(batches[2:]))),
            "an evaluation": calls(lambda: run.evaluate("the evaluation")),
        }
        if accelerator.is_main_process:
            evaluated = len(run.evaluator.loader)
            print(json.dumps({"engine": engine_name(accelerator), "evaluation_batches": evaluated} | found))
    accelerator.end_training()


if __name__ == "__main__":
    main()
