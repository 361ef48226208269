"""The dry run (`--dry_run`): prints sizes, time and memory, measured over two real updates."""

import logging
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import yaml
from accelerate.utils import DistributedType, gather_object
from torch import nn
from tqdm import tqdm

from lora_dist.data.batch import Batch
from lora_dist.data.loader import batches
from lora_dist.data.sources.load import ImageData
from lora_dist.errors import ErrorCollector, UserError
from lora_dist.model.lora.adapter_io import PREFIX
from lora_dist.model.lora.parameter_names import is_counted
from lora_dist.model.lora.trainable import set_training
from lora_dist.settings.cli import flatten
from lora_dist.storage.disk import free_bytes, readable
from lora_dist.training.failures import data_failure, update_explained
from lora_dist.training.reporting.report import processes_text
from lora_dist.training.reporting.throughput import peak_memory_mb
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.disk_budget import Sizes
from lora_dist.training.schedule import is_due
from lora_dist.training.step import LostBatchError, make_update

logger = logging.getLogger(__name__)

UPDATES = 2
MOST_LINES = 24


@dataclass(frozen=True)
class Measurement:
    """Time and memory of the updates and the evaluation batch of a dry run.

    Attributes:
        update_seconds: seconds of an update, including the wait for its data.
        evaluation_seconds: seconds of a whole evaluation, estimated from one batch.
        peak_memory_mb: memory of the process that takes most, in MiB.
    """

    update_seconds: float
    evaluation_seconds: float
    peak_memory_mb: float


def dry_run(
    run: TrainingRun,
    data: ImageData,
    parameters: tuple[int, int],
    sizes: Sizes,
    errors: ErrorCollector,
) -> None:
    """Prints the settings as YAML and the plan of the run. Must be called on every process.

    Args:
        parameters: trainable and all.
        sizes: of the files that it writes.
        errors: errors that were found so far.

    Raises:
        UserError: an update cannot be made.
    """
    measured = measure(run, parameters[1])
    if run.engine.accelerator.is_main_process:
        print(yaml.safe_dump(flatten(run.settings), sort_keys=False, allow_unicode=True))
        print(describe(run, data, parameters, sizes, measured), flush=True)
    run.engine.accelerator.end_training()
    if not errors.found:
        logger.info("nothing was written")


def measure(run: TrainingRun, all_parameters: int) -> Measurement:
    """Makes the next two updates, and evaluates one batch. Must be called on every process."""
    device = run.engine.accelerator.device
    first_step = run.progress.step
    steps = range(first_step, min(first_step + UPDATES, run.schedule.total_steps))
    stream = run.stream(steps.start, steps.stop)
    update = time_updates(run, steps, stream)[-1] if steps else 0.0
    evaluation = _time_evaluation(run)
    peak = peak_memory_mb(device)
    if device.type == "cpu" and run.engine.accelerator.is_main_process:
        # At the end of a run, the first process loads the base once more, to write the result.
        peak += 4 * all_parameters / 2**20
    return Measurement(update, evaluation, max(gather_object([peak])))


def time_updates(run: TrainingRun, steps: range, stream: Iterator[Batch]) -> list[float]:
    """Makes updates with the batches of `stream`. Returns the seconds of each, including the wait for its data.

    Called on every process.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    set_training(run.engine.model)
    seconds = []
    for step in steps:
        start = time.perf_counter()
        run.watch.enter(f"update {step + 1}", extra_time=True)
        try:
            with update_explained(step):
                update = make_update(run.begin_update(step), stream, run.settings.optimization.max_grad_norm)
                if update.nonfinite:
                    raise UserError(f"the {update.nonfinite} of update {step + 1} is not finite; see --learning_rate")
                if run.average is not None:
                    run.average.update(step)
        except LostBatchError as error:
            raise data_failure(error) from error
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.inference_mode()
def _time_evaluation(run: TrainingRun) -> float:
    evaluator, accelerator = run.evaluator, run.engine.accelerator
    run.engine.model.eval()
    start = time.perf_counter()
    batch = next(batches(evaluator.loader, accelerator.device))
    float(run.engine.model(pixel_values=batch.pixel_values).logits.float().sum())
    return (time.perf_counter() - start) * len(evaluator.loader)


def describe(
    run: TrainingRun, data: ImageData, parameters: tuple[int, int], sizes: Sizes, measured: Measurement
) -> str:
    """Returns the plan of the run as text, one line per topic."""
    plan, schedule, accelerator = run.plan, run.schedule, run.engine.accelerator
    options, first_step = run.settings.run, run.progress.step
    trainable, total = parameters
    steps, samples = schedule.total_steps - first_step, min(plan.effective_batch, plan.num_samples)
    evaluations = sum(
        is_due(options.eval_steps, step, plan.steps_per_epoch, schedule.total_steps)
        for step in range(first_step + 1, schedule.total_steps + 1)
    )
    training, evaluation = steps * measured.update_seconds, (evaluations + 1) * measured.evaluation_seconds
    precision = "fp32" if run.precision == "no" else run.precision
    kind = accelerator.distributed_type
    engine = "" if kind == DistributedType.NO else f"{kind.value}, "
    root = run.checkpointer.directory.parent
    rows = [
        ("data", f"{len(data.train):,} training and {len(data.validation):,} validation images"),
        ("classes", f"{len(data.labels)}: {', '.join(data.labels[:6])}{' …' if len(data.labels) > 6 else ''}"),
        (
            "launch",
            f"{processes_text(plan.world_size)} on {socket.gethostname()}, {engine}{precision}, "
            f"{accelerator.device.type}",
        ),
        (
            "updates",
            f"{steps:,} of {samples} samples: {plan.per_device_batch} per process x {plan.accumulation} "
            f"accumulated x {processes_text(plan.world_size)}; {plan.steps_per_epoch:,} per epoch"
            + (f"; {first_step:,} are done" if first_step else ""),
        ),
        ("trains", f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f}%)"),
        *(("", line) for line in _groups(run.engine.unwrapped)),
        ("frozen", f"{total - trainable:,} parameters"),
        (
            "time",
            f"{_interval(training + evaluation)}: {_interval(training)} of updates ({measured.update_seconds:.3g} s "
            f"each) and {_interval(evaluation)} of {evaluations + 1} evaluations",
        ),
        ("memory", f"{measured.peak_memory_mb:,.0f} MiB per process at the peak, on the {accelerator.device.type}"),
        (
            "disk",
            f"{readable(sizes.total)} in {root}, which has {readable(free_bytes(root))} free: {sizes.checkpoints} "
            f"checkpoints of {readable(sizes.checkpoint)}, and the result of {readable(sizes.result)}",
        ),
    ]
    return "\n".join(f"{name:<8} {text}" for name, text in rows)


def _groups(model: nn.Module) -> Iterator[str]:
    """Lists the trained parameters; names that differ only in numbers share a line."""
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_counted(name):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            key = re.sub(r"\b\d+\b", "*", name.removeprefix(PREFIX)), shape
            groups[key] = groups.get(key, 0) + 1
    lines = [f"  {count:>4} x {list(shape)}  {name}" for (name, shape), count in groups.items()]
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield f"  … and {len(lines) - MOST_LINES} more"


def _interval(seconds: float) -> str:
    return tqdm.format_interval(round(seconds))
