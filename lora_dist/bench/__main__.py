"""Benchmarks a training run: `accelerate launch … -m lora_dist.bench [flags of lora_dist.train]`."""

import os
import tempfile
from pathlib import Path

from lora_dist.processes.failure import report_failure
from lora_dist.processes.huge_pages import restart_with_huge_pages
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_launcher
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.cli import argv_or, parse

DESCRIPTION = """Benchmark the training of an image classifier: images/s, data loader, share of the hardware's speed,
memory, checkpoints and bottleneck. Takes the flags of lora_dist.train. The trained weights are discarded."""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Parses the settings and runs the benchmark."""
    end_with_launcher()
    with report_failure():
        flags = argv_or(argv)
        settings = parse(
            BenchSettings, flags, prog="lora_dist.bench", description=DESCRIPTION, contradictions=contradictions
        )
        if __name__ == "__main__":
            restart_with_huge_pages()
        with tempfile.TemporaryDirectory() as directory:
            bench(settings, flags, Path(directory))


def bench(settings: BenchSettings, flags: list[str], directory: Path) -> None:
    """Runs the comparison if requested, then the measurements, and reports both. Called on every process.

    Args:
        flags: Command line that `settings` were parsed from.
        directory: Where the run writes its files.
    """
    from lora_dist.bench.results import append_row, require_appendable

    load = os.getloadavg()[0]
    file = Path(settings.benchmark.csv) if settings.benchmark.csv else None
    if file is not None and os.environ.get("RANK", "0") == "0":
        require_appendable(file)
    comparison = None
    if settings.benchmark.compare:
        # Before this process allocates memory and starts threads.
        from lora_dist.bench.compare import compare

        comparison = compare(flags, settings.benchmark.rounds)

    from lora_dist.bench.measure import assemble_unwritten, measure
    from lora_dist.bench.report import lines, row
    from lora_dist.data.sources import streaming
    from lora_dist.training.launching import launch_run

    if settings.data.streaming:
        streaming.prepare(settings.data)
    accelerator = launch_run(settings)
    run = assemble_unwritten(settings, accelerator, directory)
    with run.watch.watching():
        measured = measure(run, settings.benchmark.updates)
    if accelerator.is_main_process:
        print("\n".join(lines(run, measured, comparison)), flush=True)
        if file is not None:
            append_row(file, row(run, measured, comparison, load))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
