"""Features of a frozen backbone: computed once for each image, so that a head trains on them many times faster.

The features are the inputs that the head has in training on images. A run therefore trains on the same numbers, up to
the rounding of sums in batches of other sizes.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.modeling_outputs import ImageClassifierOutput

from lora_dist.data.feature_batches import Features, TrainFeatures
from lora_dist.data.loader import WorkerBatchSampler, batches, workers_of
from lora_dist.data.sampling.order import PADDING_INDEX, Sample, evaluation_batches
from lora_dist.data.sources.split import Split
from lora_dist.model.lora.adapters import base_of
from lora_dist.model.lora.trainable import set_training
from lora_dist.processes.workers import worker_loader
from lora_dist.training.run import TrainingRun

logger = logging.getLogger(__name__)

MAX_BYTES = 2**31
"""Largest features that a process keeps in memory."""


def on_features(run: TrainingRun, heads: list[str]) -> TrainingRun:
    """Returns a run that trains and evaluates the head on features, or the run itself where features would change it.

    Must be called on every process, in the watch's context.
    """
    settings, augmentation = run.settings, run.settings.augmentation
    if settings.model.tuning != "head" or augmentation.augmentation != "none" or augmentation.random_erasing:
        return run
    (reason,) = broadcast_object_list([_obstacle(run, heads)])
    if reason is not None:
        logger.info("the head trains on images, not on features computed once: %s", reason)
        return run
    start = time.perf_counter()
    model = run.engine.unwrapped
    head = base_of(model).get_submodule(heads[0])
    run.watch.enter("computing the features of the frozen backbone", extra_time=True)
    split, evaluator = run.images.split, run.evaluator
    assert isinstance(split, Split)
    train = collect(run, model, head, split, _train_loader(run))
    # Of a copy, whose worker processes end with it.
    validation = collect(run, model, head, evaluator.split, replace(evaluator).loader)
    _accept_features(base_of(model), head, train.values.shape[1:])
    skip = settings.data.on_bad_image == "skip"
    logger.info(
        "computed %s features of each of %d images in %.1f s; the head trains on them",
        "x".join(map(str, train.values.shape[1:])),
        len(train.values) + len(validation.values),
        time.perf_counter() - start,
    )
    return replace(run, features=TrainFeatures(train, skip), evaluator=replace(evaluator, features=validation))


@torch.no_grad()
def collect(run: TrainingRun, model: nn.Module, head: nn.Module, split: Split, loader: DataLoader) -> Features:
    """Returns the inputs of the head for all samples of a split, on every process.

    Args:
        run: whose watch and requests to stop are served after each batch.
        model: to call; left in evaluation mode.
        head: a module in it.
        split: the samples.
        loader: of this process's share of them.
    """
    accelerator = run.engine.accelerator
    model.eval()
    values, found = [], []
    with _calls_of(head) as calls:
        for batch in batches(loader, accelerator.device):
            model(pixel_values=batch.pixel_values)
            values.append(calls.pop()[0].detach())
            found.append(batch.indices.where(batch.weights > 0, PADDING_INDEX))
            run.watch.enter("computing the features of the frozen backbone")
            run.preemption.check()
    padded = (accelerator.pad_across_processes(torch.cat(part), pad_index=PADDING_INDEX) for part in (values, found))
    rows, indices = (accelerator.gather(part).cpu() for part in padded)
    is_read = indices != PADDING_INDEX
    features = Features(
        torch.zeros(len(split), *rows.shape[1:], dtype=rows.dtype),
        torch.from_numpy(split.labels).long(),
        torch.zeros(len(split), dtype=torch.bool),
    )
    features.values[indices[is_read]], features.readable[indices[is_read]] = rows[is_read], True
    return features


def _obstacle(run: TrainingRun, heads: list[str]) -> str | None:
    """Returns the reason for which features cannot stand for the images; None if they can."""
    accelerator, split = run.engine.accelerator, run.images.split
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return "FSDP and DeepSpeed own the model"
    if run.settings.model.torch_compile:
        return "the model is compiled"
    if not isinstance(split, Split):
        return "the data is streamed or resampled"
    if any(run.images.mixing):
        return "images are mixed"
    if len(heads) != 1:
        return f"several modules train: {', '.join(heads)}"
    return _obstacle_in_model(run, heads[0])


def _obstacle_in_model(run: TrainingRun, head_name: str) -> str | None:
    """Returns the reason for which a head cannot train on its inputs alone; None if it can.

    The inputs must be a fixed function of the image and fit into memory, and the logits the output of the head.
    """
    model, transforms = run.engine.unwrapped, run.evaluator.transforms
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, transforms.height, transforms.width, generator=generator)
    pixels = pixels.to(run.engine.accelerator.device)
    seen: list[Tensor] = []
    with torch.no_grad(), _calls_of(base_of(model).get_submodule(head_name)) as calls:
        for trains in (False, True, True):
            set_training(model) if trains else model.eval()
            torch.manual_seed(len(seen))
            logits = model(pixel_values=pixels).logits
            if len(calls) != 1:
                return f"{head_name} is called {len(calls)} times for an image"
            features, output = calls.pop()
            if not trains and not torch.equal(output.float(), logits.float()):
                return f"the logits are not the output of {head_name}"
            seen.append(features)
    if not all(torch.equal(seen[0], other) for other in seen[1:]):
        return "the backbone has dropout or other random layers"
    needed = seen[0][0].nbytes * (len(run.images.split) + len(run.evaluator.split))
    return None if needed <= MAX_BYTES else f"they would take {needed / 2**30:.1f} GiB"


@contextmanager
def _calls_of(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list to which each call of a module with one tensor adds this and its output."""
    calls: list[tuple[Tensor, Tensor]] = []

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if len(inputs) == 1:
            calls.append((inputs[0], output))

    with module.register_forward_hook(add):
        yield calls


def _accept_features(base: nn.Module, head: nn.Module, shape: torch.Size) -> None:
    """Lets a classifier take the inputs of its head, [B, *shape], as well as images."""
    whole = base.forward

    def forward(pixel_values: Tensor, **options: object) -> object:
        if pixel_values.shape[1:] == shape:
            return ImageClassifierOutput(logits=head(pixel_values))
        return whole(pixel_values=pixel_values, **options)

    base.forward = forward


def _train_loader(run: TrainingRun) -> DataLoader:
    """This process's share of the training images, each once, as training sees them."""
    images, accelerator, settings = run.images, run.engine.accelerator, run.settings
    shares = evaluation_batches(
        len(images.split),
        settings.optimization.per_device_eval_batch_size,
        accelerator.num_processes,
        accelerator.process_index,
    )
    samples = [[Sample(0, index, 0, index, float(index != PADDING_INDEX)) for index in share] for share in shares]
    workers = workers_of(settings.data, accelerator.device)
    return worker_loader(
        images,
        batch_sampler=WorkerBatchSampler(samples, workers),
        workers=workers,
        prefetch_factor=settings.data.dataloader_prefetch_factor,
        pin_memory=accelerator.device.type == "cuda",
    )
