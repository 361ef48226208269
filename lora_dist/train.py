"""Fine-tunes an image classifier: `accelerate launch -m lora_dist.train --config NAME|FILE [--setting value …]`.

From Python: `lora_dist.fit("NAME|FILE", setting=value, …)`.
"""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dist.errors import ErrorCollector, UserError
from lora_dist.processes.failure import report_failure
from lora_dist.processes.huge_pages import restart_with_huge_pages
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.processes.parent_death import end_with_launcher
from lora_dist.processes.run_lock import RunLock
from lora_dist.settings.cli import argv_or, flatten, from_keywords, parse
from lora_dist.settings.train import Settings
from lora_dist.settings.train_contradictions import contradictions
from lora_dist.storage.writable import require_writable


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Reads the settings, then trains or evaluates."""
    end_with_launcher()
    with report_failure(), RunLock() as lock:
        settings = parse(
            Settings,
            argv_or(argv),
            prog="lora_dist.train",
            description="Fine-tune an image classifier with LoRA, on one process or many.",
            contradictions=contradictions,
        )
        if __name__ == "__main__":
            restart_with_huge_pages()
        if settings.run.do_eval_only:
            require_writable(Path(settings.run.output_dir))
            from lora_dist.training.evaluate_only import evaluate_only

            evaluate_only(settings, lock)
        else:
            train(settings, lock)


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished run.

    Attributes:
        path: the adapter, or the model with `tuning="full"`; `lora_dist.load` takes it.
        metrics: the content of `all_results.json`, such as `eval_accuracy`.
        output_dir: all files of the run.
    """

    path: Path
    metrics: dict[str, Any]
    output_dir: Path


def fit(config: str | os.PathLike[str] | None = None, **settings: Any) -> TrainingResult:
    """Trains in this process, as the command does; under a launcher, all processes call it.

    Args:
        config: packaged recipe, or YAML file of settings.
        settings: by the names of `python -m lora_dist.train --help`, such as `learning_rate=1e-3`; they override
            `config`.

    Raises:
        UserError: a setting is wrong, or the run failed for a reason that the message explains.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("lora_dist.fit handles signals, such as Ctrl-C: call it in the main thread")
    with report_failure(), RunLock() as lock:
        chosen = from_keywords(Settings, config, settings, prog="lora_dist.fit", contradictions=contradictions)
        if chosen.run.dry_run or chosen.run.do_eval_only:
            raise UserError("lora_dist.fit trains: for --dry_run and --do_eval_only use python -m lora_dist.train")
        from lora_dist.processes.runtime import torch_flags_restored

        with torch_flags_restored():
            train(chosen, lock)

    from lora_dist.training.saving.output import Output

    output = Output(Path(chosen.run.output_dir))
    path = output.model if chosen.model.tuning == "full" else output.adapter
    return TrainingResult(path, json.loads(output.results.read_text(encoding="utf-8")), output.root)


def train(settings: Settings, lock: RunLock) -> None:
    """Prepares a run, and reports it (--dry_run), or trains, evaluates and writes the result."""
    options = settings.run
    errors = ErrorCollector(options.dry_run)
    with errors.collect():
        require_writable(Path(options.output_dir))
    # Imported here, because the settings are to be read, and a mistake in them reported, before torch is loaded.
    from lora_dist.data.sources import streaming
    from lora_dist.data.sources.split import Split
    from lora_dist.processes.watch import Watch
    from lora_dist.storage.atomic import finish_replacing
    from lora_dist.training.assembly import assemble
    from lora_dist.training.dry_run import dry_run
    from lora_dist.training.failures import resume_hint_added, stopped_on_request
    from lora_dist.training.final_evaluation import final_evaluations
    from lora_dist.training.frozen_backbone import on_features
    from lora_dist.training.launching import launch_run, lock_output
    from lora_dist.training.loop import training_loop
    from lora_dist.training.probe import probe
    from lora_dist.training.reporting.external_trackers import require_trackers
    from lora_dist.training.reporting.report import announce, show_inputs
    from lora_dist.training.reselect_best import reselect_best
    from lora_dist.training.saving.output import Output, find_resume
    from lora_dist.training.saving.publisher import open_publisher, require_token

    watch = Watch(options.stall_timeout, patient=settings.data.streaming)
    with errors.raise_all():
        if settings.data.streaming:
            streaming.prepare(settings.data)
        accelerator = launch_run(settings)
        watch.watch_peers()
        output = Output(Path(options.output_dir))
        resumed = publisher = None
        with errors.collect():
            if not options.dry_run:
                lock_output(lock, output.root, accelerator, options.ddp_timeout)
                finish_replacing(output.checkpoints)
            resumed = find_resume(output, options.resume_from_checkpoint)
        with errors.collect():
            require_token(settings.hub)
            require_trackers(options.report_to)
        if not options.dry_run:
            publisher = open_publisher(accelerator, settings.hub, output, resumes=resumed is not None)

        assembled = assemble(settings, accelerator, output, resumed, publisher, errors, watch)
        run, result_writer = assembled.run, assembled.result_writer
        announce(assembled.data, run.plan, run.schedule, assembled.parameters, accelerator, run.precision)
        if options.dry_run:
            with watch.watching():
                dry_run(run, assembled.data, assembled.parameters, assembled.sizes, errors)
            return
    run.tracker.settings(flatten(run.settings))
    show_inputs(run)
    with resume_hint_added(run), stopped_on_request(run), watch.watching():
        heads = list(result_writer.base.heads)
        if options.probe and isinstance(assembled.data.train, Split):
            probe(run, heads, assembled.data.train, output.probe)
        run = on_features(run, heads)
        reselect_best(run)
        training_loop(run, result_writer.push_best)
        run.checkpointer.restore_best(run.progress)
        evaluation, test = final_evaluations(run, assembled.data)
        result_writer.finalize(run, evaluation, test)
        run.preemption.clear_save_request()
    accelerator.end_training()
    # Last, because an upload may take long: no process waits for another one any more.
    result_writer.publish(run)


if __name__ == "__main__":
    run_command(main)
