"""A run put together from its settings: data, model, order, and what drives and records them."""

import hashlib
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from accelerate import Accelerator

from lora_dist.data.batch import TrainImages
from lora_dist.data.cache.image_cache import cached
from lora_dist.data.loader import bytes_ahead
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sampling.protocol import TrainingSplit
from lora_dist.data.sources import streaming
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.data.sources.split import Split
from lora_dist.engines.engine import make_engine
from lora_dist.errors import Problems, UserError
from lora_dist.model.trainable import count_parameters, make_trainable
from lora_dist.model.warm_start import load_warm_start
from lora_dist.processes.agreement import VISIBLE_SECONDS, require_agreement
from lora_dist.processes.preemption import Preemption
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.watch import Watch
from lora_dist.processes.workers import require_shared_memory
from lora_dist.settings.cli import flatten
from lora_dist.settings.train import Settings
from lora_dist.training.batch_size import fit_batch_size
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.identity import as_resumed, identity_of
from lora_dist.training.loop import Job
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving.checkpoint import Checkpoint
from lora_dist.training.saving.disk_budget import Sizes, require_disk_space
from lora_dist.training.saving.output import Output
from lora_dist.training.saving.publisher import Publisher
from lora_dist.training.saving.result_writer import ResultWriter
from lora_dist.training.saving.state import Checkpointer, Progress
from lora_dist.training.schedule import Schedule


@dataclass(frozen=True)
class Run:
    """A run that is ready to begin, or to go on.

    Attributes:
        job: what `fit` drives.
        progress: where it stands.
        result_writer: writes the result.
        data: that it trains on.
        parameters: trainable and all.
        sizes: of what it writes.
    """

    job: Job
    progress: Progress
    result_writer: ResultWriter
    data: ImageData
    parameters: tuple[int, int]
    sizes: Sizes


def assemble(
    settings: Settings,
    accelerator: Accelerator,
    output: Output,
    resumed: Checkpoint | None,
    publisher: Publisher | None,
    problems: Problems,
    watch: Watch,
) -> Run:
    """Loads, checks and connects all parts of a run. Called on every process.

    Args:
        settings: as given.
        accelerator: of the launch.
        output: directory of the run.
        resumed: to go on from.
        publisher: pushes to the Hub, on the process that has it.
        problems: takes note, in a dry run, of what speaks against the run.
        watch: is told what the run is doing.

    Raises:
        UserError: something of it is not there, does not fit, or is not the same on all processes.
    """
    settings = as_resumed(settings, resumed)
    run, preflight = settings.run, Preflight(timedelta(seconds=settings.run.ddp_timeout))
    with preflight.first_process_first("loaded", accelerator):
        data = _load(settings, accelerator, problems)
        settings, base, start = load_warm_start(settings, data.labels)
    transforms = ImageTransforms(base.processor, settings.augmentation)
    with problems.collect():
        data = _cached(data, settings, transforms, build=not problems.dry_run)
    model = make_trainable(base, settings.model, settings.lora)
    if start is not None:
        start.load_into(model)
    if settings.optimization.auto_batch_size:
        fitting = fit_batch_size(accelerator, model, transforms, settings.optimization)
        settings = settings.model_copy(update={"optimization": fitting})
    parameters = count_parameters(model)
    sizes = Sizes.of(model, settings.model.tuning == "full", run.save_total_limit)
    with problems.collect():
        if accelerator.is_main_process:
            require_disk_space(output.root, sizes)

    optimization = settings.optimization
    optimizer = make_optimizer(model, optimization, settings.lora.loraplus_lr_ratio)
    order = make_order(settings, data.train, accelerator.num_processes, accelerator.process_index)
    schedule = Schedule.of(optimization, order.steps_per_epoch)
    images = TrainImages(data.train, transforms, settings.augmentation, run.seed, settings.data.on_bad_image == "skip")
    with problems.collect():
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        ahead = bytes_ahead(images, order, 0, settings.data, accelerator.device)
        # An evaluation's batches come on top, of as many bytes a sample or fewer.
        ahead += ahead * optimization.per_device_eval_batch_size // order.per_device_batch
        require_shared_memory(on_this_machine * ahead)
    identity = identity_of(settings, base, start, data, order)
    preflight.arrive("ready")
    require_agreement(
        accelerator,
        None if run.dry_run else output.root,
        _facts(settings, identity, data, resumed),
        min(VISIBLE_SECONDS, run.ddp_timeout / 2),
    )

    engine = make_engine(accelerator, model, optimizer, optimization)
    checkpointer = Checkpointer(output.checkpoints, engine, identity, run.save_total_limit, watch.writing)
    progress = Progress()
    with problems.collect():
        progress = checkpointer.restore(resumed) if resumed is not None else progress
    writes = accelerator.is_main_process and not run.dry_run
    made_with = flatten(settings)
    if writes:
        splits = data.describe_splits()
        made_with = output.begin(made_with, splits, engine.unwrapped, progress.step, schedule.total_steps)
    result_writer = ResultWriter(base, data, parameters, made_with, output, publisher)
    job = Job(
        settings=settings,
        engine=engine,
        images=images,
        order=order,
        schedule=schedule,
        evaluator=Evaluator(
            accelerator,
            engine.model,
            data.validation,
            transforms,
            data.labels,
            optimization.per_device_eval_batch_size,
            settings.data,
        ),
        checkpointer=checkpointer,
        preemption=Preemption(accelerator, output.save_request),
        tracker=Tracker(
            output.root,
            enabled=writes,
            first_step=progress.step,
            total_steps=schedule.total_steps,
            evaluated=progress.last_evaluated_step == progress.step,
        ),
        watch=watch,
        on_best=result_writer.push_best,
    )
    return Run(job, progress, result_writer, data, parameters, sizes)


def _load(settings: Settings, accelerator: Accelerator, problems: Problems) -> ImageData:
    """The data; where there are none, a dry run looks at the model all the same."""
    try:
        if settings.data.streaming:
            return streaming.load_streamed(settings.data, settings.run.seed, accelerator.num_processes)
        return load_data(settings.data, settings.run.seed)
    except UserError:
        if problems.dry_run:
            with problems.collect():
                load_warm_start(settings, ["unknown", "unknown too"])
        raise


def make_order(settings: Settings, split: TrainingSplit, world_size: int, rank: int) -> BatchPlan:
    """The order in which process `rank` of `world_size` sees its training split."""
    return BatchPlan(
        sample_order=split.sample_order(settings.run.seed),
        per_device_batch=settings.optimization.per_device_train_batch_size,
        accumulation=settings.optimization.gradient_accumulation_steps,
        world_size=world_size,
        rank=rank,
    )


def _cached(data: ImageData, settings: Settings, transforms: ImageTransforms, build: bool) -> ImageData:
    """The data with training images from the cache, where there is to be one."""
    if settings.data.cache_dir is None or not isinstance(data.train, Split):
        return data
    size = transforms.height, transforms.width
    return replace(data, train=cached(data.train, settings.data.cache_dir, size, build))


def _facts(settings: Settings, identity: dict[str, Any], data: ImageData, resumed: Checkpoint | None) -> dict[str, Any]:
    """What the processes of a launch have to share."""
    return {
        "update to go on from": resumed.state["progress"]["step"] if resumed is not None else 0,
        "validation_data": data.validation.fingerprint(),
        **identity,
        "classes": hashlib.sha256(repr(data.labels).encode()).hexdigest()[:16],
        **settings.optimization.model_dump(),
        **settings.lora.model_dump(),
        **settings.augmentation.model_dump(),
    }
