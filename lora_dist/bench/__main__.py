"""Measures a run instead of making it: `accelerate launch … -m lora_dist.bench [flags of lora_dist.train]`."""

import os
import tempfile
from pathlib import Path

from lora_dist.processes.failure import report_failure
from lora_dist.processes.huge_pages import move_to_huge_pages
from lora_dist.processes.launcher import end_with_launcher
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.settings.bench import BenchSettings, contradictions
from lora_dist.settings.cli import argv_or, parse

DESCRIPTION = """Measure the training of an image classifier: images/s, the loader, the share of the hardware's speed,
memory, checkpoints, and what bounds it. Takes the flags of lora_dist.train; trains nothing that is kept."""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Reads the settings, measures, prints, and adds a row to a file if told so."""
    end_with_launcher()
    with report_failure():
        flags = argv_or(argv)
        settings = parse(
            BenchSettings, flags, prog="lora_dist.bench", description=DESCRIPTION, contradictions=contradictions
        )
        if __name__ == "__main__":
            move_to_huge_pages()
        with tempfile.TemporaryDirectory() as directory:
            bench(settings, flags, Path(directory))


def bench(settings: BenchSettings, flags: list[str], directory: Path) -> None:
    """Compares if told so, then measures. Called on every process.

    Args:
        settings: of the run and of measuring it.
        flags: that they come from.
        directory: for what a run writes.
    """
    from lora_dist.bench.results import add_row, require_room_for_rows

    load = os.getloadavg()[0]
    file = Path(settings.measuring.csv) if settings.measuring.csv else None
    if file is not None and os.environ.get("RANK", "0") == "0":
        require_room_for_rows(file)
    comparison = None
    if settings.measuring.compare:
        # Before this process takes memory and threads of its own.
        from lora_dist.bench.compare import compare

        comparison = compare(flags, settings.measuring.rounds)

    from lora_dist.bench.measure import assemble_unwritten, measure
    from lora_dist.bench.report import lines, row
    from lora_dist.data.sources import streaming
    from lora_dist.processes.runtime import launch

    if settings.data.streaming:
        streaming.prepare(settings.data)
    accelerator = launch(settings.optimization.mixed_precision, settings.run.ddp_timeout)
    job = assemble_unwritten(settings, accelerator, directory)
    with job.watch.watching():
        figures = measure(job, settings.measuring.updates)
    if accelerator.is_main_process:
        print("\n".join(lines(job, figures, comparison)), flush=True)
        if file is not None:
            add_row(file, row(job, figures, comparison, load))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
