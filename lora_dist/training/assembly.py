"""Builds a run from its settings: data, model, engine, checkpoints and reports."""

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from lora_dist.data.batch import TrainImages
from lora_dist.data.cache.image_cache import cached
from lora_dist.data.loader import bytes_ahead, idle_workers
from lora_dist.data.pixels.limits import allow_pixels
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sampling.training_split import TrainingSplit
from lora_dist.data.sources import streaming
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.data.sources.oversampled import OversampledSplit
from lora_dist.data.sources.split import Split
from lora_dist.engines.bf16_base import cast_base, require_bf16_forward
from lora_dist.engines.engine import Engine, fuses, make_engine, on_device
from lora_dist.engines.zero_engine import moments_of
from lora_dist.errors import ErrorCollector, UserError
from lora_dist.model.base.backbone import Base
from lora_dist.model.lora.injection import adapted_layers
from lora_dist.model.lora.trainable import blank_image, count_parameters, make_trainable, parameter_steps
from lora_dist.model.trained.warm_start import WarmStart, load_warm_start
from lora_dist.processes.agreement import VISIBLE_SECONDS, require_agreement
from lora_dist.processes.devices import inference_batch_size
from lora_dist.processes.preemption import Preemption
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.watch import Watch
from lora_dist.processes.workers import require_shared_memory
from lora_dist.settings.cli import flatten
from lora_dist.settings.fields import SINGLE_LABEL
from lora_dist.settings.train import Settings
from lora_dist.training.batch_size import fit_batch_size
from lora_dist.training.evaluation import Evaluator
from lora_dist.training.identity import (
    as_resumed,
    conversion_of,
    identity_of,
    settings_of_run,
    with_conversion,
    with_pooling,
)
from lora_dist.training.optimizer import make_optimizer
from lora_dist.training.problems.problem_types import PROBLEM_TYPES
from lora_dist.training.progress import Progress
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.reselect_best import must_reselect
from lora_dist.training.run import TrainingRun
from lora_dist.training.saving.checkpoint import Checkpoint
from lora_dist.training.saving.checkpointer import Checkpointer
from lora_dist.training.saving.disk_budget import Sizes, require_disk_space
from lora_dist.training.saving.output import Output
from lora_dist.training.saving.publisher import Publisher
from lora_dist.training.saving.result_writer import ResultWriter
from lora_dist.training.schedule import Schedule
from lora_dist.training.weight_average import WeightAverage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembled:
    """A run that is ready to start or to resume.

    Attributes:
        run: what the training loop works on.
        parameters: numbers of trainable and of all parameters.
        sizes: bytes of the checkpoints and the result.
    """

    run: TrainingRun
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
    errors: ErrorCollector,
    watch: Watch,
) -> Assembled:
    """Loads, checks and connects the parts of a run. Must be called on every process.

    Args:
        resumed: checkpoint to resume from.
        publisher: pushes to the Hub; None except on the main process of a run with --push_to_hub.
        errors: collects the errors of a dry run.
        watch: is informed of what the run is doing.

    Raises:
        UserError: something is missing, does not fit, or differs between processes.
    """
    preflight = Preflight(timedelta(seconds=settings.run.ddp_timeout))
    settings, data, base, start, transforms = _load_inputs(settings, accelerator, resumed, errors, watch, preflight)
    settings, model, optimizer = _make_model(settings, accelerator, base, start, transforms)
    options, optimization, parameters = settings.run, settings.optimization, count_parameters(model)
    sizes = _sizes(settings, model, optimizer)
    with errors.collect():
        if accelerator.is_main_process:
            require_disk_space(output.root, sizes)

    train = _balanced(data.train, settings)
    plan = make_plan(settings, train, accelerator.num_processes, accelerator.process_index)
    if idle := idle_workers(plan, settings.data, accelerator.device):
        logger.info(
            "%d data loader workers of each process are idle, because there are fewer shards to read at a time than "
            "workers: set --streaming_lanes higher or --dataloader_num_workers lower, or write the data in more shards",
            idle,
        )
    schedule = Schedule.of(optimization, plan.steps_per_epoch)
    loss = PROBLEM_TYPES[settings.data.problem_type].loss(settings, data)
    images = TrainImages(train, transforms, settings.augmentation, options.seed, settings.data.on_bad_image == "skip")
    with errors.collect():
        _require_shared_memory(images, plan, settings, accelerator.device)
    identity = identity_of(settings, base, start, data, plan, transforms.conversion)
    preflight.arrive("ready")
    require_agreement(
        accelerator,
        None if options.dry_run else output.root,
        _facts(settings, identity, data, resumed) | {"mixed_precision": accelerator.mixed_precision},
        min(VISIBLE_SECONDS, options.ddp_timeout / 2),
    )

    engine = make_engine(accelerator, model, optimizer, optimization)
    average = None if optimization.ema_decay is None else WeightAverage(engine, optimization.ema_decay)
    checkpointer = Checkpointer(output.checkpoints, engine, identity, options.save_total_limit, watch.writing, average)
    progress = Progress()
    with errors.collect():
        progress = checkpointer.restore(resumed) if resumed is not None else progress
    writes = accelerator.is_main_process and not options.dry_run
    made_with = flatten(settings)
    if writes:
        finished = progress.is_over(schedule.total_steps, optimization.early_stopping_patience)
        finished = finished and not must_reselect(settings, data.validation, progress)
        origin = settings_of_run(resumed)
        made_with = output.begin(made_with, data.describe_splits(), engine.unwrapped, progress.step, finished, origin)
    run = TrainingRun(
        settings=settings,
        engine=engine,
        average=average,
        images=images,
        plan=plan,
        loss=loss,
        schedule=schedule,
        evaluator=_make_evaluator(settings, engine, data, transforms),
        checkpointer=checkpointer,
        preemption=Preemption(accelerator, output.save_request),
        tracker=Tracker(
            output.root,
            enabled=writes,
            first_step=progress.step,
            total_steps=schedule.total_steps,
            evaluated=progress.last_evaluated_step == progress.step,
            report_to=options.report_to,
            settings=made_with,
        ),
        watch=watch,
        progress=progress,
    )
    result_writer = ResultWriter(base, data, parameters, made_with, output, publisher)
    return Assembled(run, result_writer, data, parameters, sizes)


class _Inputs(NamedTuple):
    """The settings as resolved, and what they name: data, base, initial adapter and the transforms of images."""

    settings: Settings
    data: ImageData
    base: Base
    start: WarmStart | None
    transforms: ImageTransforms


def _load_inputs(
    settings: Settings,
    accelerator: Accelerator,
    resumed: Checkpoint | None,
    errors: ErrorCollector,
    watch: Watch,
    preflight: Preflight,
) -> _Inputs:
    """Loads data and base, and resolves the settings that depend on them. Arguments as `assemble`."""
    allow_pixels(settings.data.max_image_pixels)
    settings = as_resumed(settings, resumed).with_default_learning_rate().with_default_metric()
    with preflight.first_process_first("loaded"):
        data = _load(settings, accelerator, errors)
        settings, base, start = load_warm_start(settings, data.labels)
    settings = with_pooling(settings, base)
    with watch.watching_step("reading images to find the pixel range"):
        conversion = conversion_of(settings.data, data, start, resumed)
    settings = with_conversion(settings, conversion)
    transforms = ImageTransforms(base.processor, settings.augmentation, conversion)
    if transforms.crops and transforms.has_border():
        logger.warning(
            "the image processor surrounds images with a border in evaluation and prediction, which the random crops "
            "of training do not have: it pads, or its crop is larger than its resize. Correct "
            "preprocessor_config.json, or train with --augmentation none"
        )
    settings = settings.with_default_eval_batch_size(
        inference_batch_size(accelerator.device, transforms.height, transforms.width)
    )
    with errors.collect():
        data = _cached(data, settings, transforms, build=not errors.dry_run)
    return _Inputs(settings, data, base, start, transforms)


def _load(settings: Settings, accelerator: Accelerator, errors: ErrorCollector) -> ImageData:
    """Loads the data. A dry run checks the model even if the data cannot be loaded."""
    try:
        if settings.data.streaming:
            data = streaming.load_streamed(settings.data, settings.run.seed, accelerator.num_processes)
        else:
            data = load_data(settings.data, settings.run.seed)
        if len(data.labels) == 1 and settings.data.problem_type == SINGLE_LABEL:
            name = data.labels[0]
            raise UserError(f"the data has a single class, {name}: there is nothing to classify. Add images of another")
        return data
    except UserError:
        if errors.dry_run:
            with errors.collect():
                load_warm_start(settings, ["unknown", "unknown too"])
        raise


def _make_model(
    settings: Settings, accelerator: Accelerator, base: Base, start: WarmStart | None, transforms: ImageTransforms
) -> tuple[Settings, nn.Module, torch.optim.Optimizer]:
    """Adds what trains to the base model, from the initial adapter if there is one, and makes the optimizer.

    Returns:
        The settings with a batch size that fits into memory, the model and its optimizer.
    """
    # Of the base alone: training changes the names of parameters.
    steps = parameter_steps(base) if settings.optimization.layer_decay != 1 else None
    model = make_trainable(base, settings.model, settings.lora)
    if settings.model.tuning == "lora":
        logger.info("LoRA adapts %s", adapted_layers(model))
    if start is not None:
        start.load_into(model)
    if settings.model.base_dtype == "bfloat16":
        cast_base(model, base.heads)
        require_bf16_forward(on_device(model, accelerator), blank_image(base.processor).to(accelerator.device))
    if settings.optimization.auto_batch_size:
        fitting = fit_batch_size(accelerator, model, transforms, settings.optimization)
        settings = settings.model_copy(update={"optimization": fitting})
    optimizer = make_optimizer(
        model, settings.optimization, settings.lora.loraplus_lr_ratio, base.heads, steps, fused=fuses(accelerator)
    )
    return settings, model, optimizer


def _sizes(settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer) -> Sizes:
    """Returns the bytes of the checkpoints and of the result."""
    return Sizes.of(
        model,
        settings.model.tuning == "full",
        settings.run.save_total_limit,
        settings.optimization.ema_decay is not None,
        len(moments_of(optimizer)),
    )


def make_plan(settings: Settings, split: TrainingSplit, world_size: int, rank: int) -> BatchPlan:
    """Returns the samples that process `rank` of `world_size` trains on in each update."""
    return BatchPlan(
        sample_order=split.sample_order(settings.run.seed),
        per_device_batch=settings.optimization.per_device_train_batch_size,
        accumulation=settings.optimization.gradient_accumulation_steps,
        world_size=world_size,
        rank=rank,
    )


def _cached(data: ImageData, settings: Settings, transforms: ImageTransforms, build: bool) -> ImageData:
    """Returns the data, with training images from the cache if --cache_dir is set."""
    if settings.data.cache_dir is None or not isinstance(data.train, Split):
        return data
    size = transforms.height, transforms.width
    return replace(data, train=cached(data.train, settings.data.cache_dir, size, build, transforms.conversion))


def _balanced(split: TrainingSplit, settings: Settings) -> TrainingSplit:
    """Returns the split, with every class equally often if --balanced_sampling is set."""
    return OversampledSplit(split) if settings.data.balanced_sampling and isinstance(split, Split) else split


def _require_shared_memory(images: TrainImages, plan: BatchPlan, settings: Settings, device: torch.device) -> None:
    """Raises `UserError` if the batches that the processes of this node prepare do not fit into shared memory."""
    ahead = bytes_ahead(images, plan, settings.data, device)
    # The batches of an evaluation are added; they have at most as many bytes per sample.
    ahead += ahead * settings.optimization.per_device_eval_batch_size // plan.per_device_batch
    require_shared_memory(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * ahead)


def _make_evaluator(settings: Settings, engine: Engine, data: ImageData, transforms: ImageTransforms) -> Evaluator:
    return Evaluator(
        engine.accelerator,
        engine.model,
        data.validation,
        transforms,
        data.labels,
        settings.optimization.per_device_eval_batch_size,
        settings.data,
        problem=PROBLEM_TYPES[settings.data.problem_type],
    )


def _facts(settings: Settings, identity: dict[str, Any], data: ImageData, resumed: Checkpoint | None) -> dict[str, Any]:
    """Returns the facts that must be the same on all processes of a launch."""
    return {
        "update to resume from": resumed.state["progress"]["step"] if resumed is not None else 0,
        "validation_data": data.validation.fingerprint(),
        **settings.optimization.model_dump(),
        **settings.lora.model_dump(),
        **settings.augmentation.model_dump(),
        **identity,
        "classes": hashlib.sha256(repr(data.labels).encode()).hexdigest()[:16],
    }
