"""Data loaders for training and evaluation; `batch.py` describes what the workers do and what the device does."""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lora_dist.data.batch import Batch, EvaluationImages, TrainImages, WorkerShard
from lora_dist.data.feature_batches import TrainFeatures
from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.prefetch import on_device
from lora_dist.data.sampling.interleave import Interleave
from lora_dist.data.sampling.order import BatchPlan, MicroBatches, Sample, evaluation_batches
from lora_dist.data.sources.split import Split
from lora_dist.errors import ProcessError
from lora_dist.processes.cores import cores_per_process
from lora_dist.processes.workers import from_workers, worker_loader
from lora_dist.settings.train import DataSettings

CPU = torch.device("cpu")
MAX_WORKERS = 16
MEASURED_SAMPLES = 8


class WorkerBatchSampler(Sampler[WorkerShard]):
    """The micro-batches of a process, split among its workers, for a `DataLoader`'s `batch_sampler`.

    A `DataLoader` hands the items of its batch sampler to its workers in turn. Samples in lanes are therefore split
    into one shard for each worker, so that each lane is read by one worker alone.
    """

    def __init__(self, micro_batches: Iterable[list[Sample]], workers: int) -> None:
        self.micro_batches = micro_batches
        self.workers = max(workers, 1)

    def __iter__(self) -> Iterator[WorkerShard]:
        for samples in self.micro_batches:
            lanes = [sample.lane for sample in samples]
            shards = 1 if lanes[0] is None else self.workers
            for worker in range(shards):
                positions = [position for position, lane in enumerate(lanes) if (lane or 0) % shards == worker]
                content = [samples[position] for position in positions]
                yield WorkerShard(content, torch.tensor(positions, dtype=torch.int64), shards)


def train_loader(
    images: TrainImages | TrainFeatures,
    plan: BatchPlan,
    first_step: int,
    last_step: int,
    settings: DataSettings,
    device: torch.device,
) -> DataLoader:
    """All micro-batches of this process for updates `first_step` to `last_step` (excluded), in one pass."""
    workers = 0 if isinstance(images, TrainFeatures) else workers_of(settings, device)
    return worker_loader(
        images,
        batch_sampler=WorkerBatchSampler(MicroBatches(plan, first_step, last_step), workers),
        workers=workers,
        prefetch_factor=settings.dataloader_prefetch_factor,
        pin_memory=device.type == "cuda",
    )


def evaluation_loader(
    split: Split,
    transforms: ImageTransforms,
    batch_size: int,
    world_size: int,
    rank: int,
    settings: DataSettings,
    device: torch.device,
) -> DataLoader:
    """This process's part of the validation split. The workers persist between evaluations."""
    batches = evaluation_batches(len(split), batch_size, world_size, rank)
    return worker_loader(
        EvaluationImages(split, transforms, settings.on_bad_image == "skip"),
        batch_sampler=batches,
        workers=min(workers_of(settings, device), len(batches)),
        prefetch_factor=settings.dataloader_prefetch_factor,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def batches(
    loader: DataLoader, device: torch.device = CPU, timed: Callable[[Iterator[Any]], Iterator[Any]] = iter
) -> Generator[Batch]:
    """The batches of a loader on `device`, with their deferred operations applied.

    Args:
        loader: of training or evaluation images.
        device: to copy the batches to.
        timed: wraps the iterator over the items of the worker processes, to measure the wait for them.

    Raises:
        ProcessError: names an image that cannot be read.
    """
    images: Any = loader.dataset
    shards: list[WorkerShard] = []

    def moved(found: Any) -> Any:
        if isinstance(found, Batch):
            return found.to(device)
        if isinstance(found, WorkerShard) and found.content is not None:
            return found._replace(content=found.content.to(device))
        return found

    for found in on_device(timed(from_workers(loader)), device, moved):
        if isinstance(found, UnreadableImageError):
            raise unreadable(found)
        if isinstance(found, Batch):
            yield images.finished(found)
            continue
        content = found.content
        shards.append(found if content is None else found._replace(content=images.finished(content)))
        if len(shards) == found.num_shards:
            yield _joined(shards, device)
            shards = []


def unreadable(error: UnreadableImageError) -> ProcessError:
    """The error that ends a run at an image that cannot be read."""
    return ProcessError(
        f"cannot read an image of the data set: {error}. Repair the file, or skip all images that cannot be read with "
        "--on_bad_image skip; without the file, the data is another one, which needs a new --output_dir."
    )


def _joined(shards: list[WorkerShard], device: torch.device) -> Batch:
    """The micro-batch of all shards, in the order of its samples for any number of workers."""
    filled = [shard for shard in shards if shard.content is not None]
    if len(filled) == 1:
        return filled[0].content
    order = torch.cat([shard.positions for shard in filled]).argsort().to(device)
    fields = zip(*(shard.content for shard in filled), strict=True)
    joined = (None if field[0] is None else torch.cat(field)[order] for field in fields)
    return Batch(*joined)  # type: ignore[arg-type]  # only the optional fields can be None


def workers_of(settings: DataSettings, device: torch.device) -> int:
    """Returns the number of worker processes of a loader: as set, or 0 on a CPU, and else the share of the cores."""
    if settings.dataloader_num_workers is not None:
        return settings.dataloader_num_workers
    if device.type == "cpu":
        return 0
    return max(1, min(MAX_WORKERS, cores_per_process() - 1))


def idle_workers(plan: BatchPlan, settings: DataSettings, device: torch.device) -> int:
    """Worker processes of this process without a lane of the stream to read; 0 without a stream."""
    order = plan.sample_order
    if not isinstance(order, Interleave):
        return 0
    lanes = len(range(plan.rank, order.count, plan.world_size))
    return max(workers_of(settings, device) - lanes, 0)


def bytes_ahead(images: TrainImages, plan: BatchPlan, settings: DataSettings, device: torch.device) -> int:
    """The most bytes of batches that the workers of a process hold ready, measured on samples of the first update."""
    ahead = workers_of(settings, device) * settings.dataloader_prefetch_factor
    if not ahead:
        return 0
    samples = next(plan.micro_batches(0))[:MEASURED_SAMPLES]
    try:
        fields = images.prepared(samples)
    except UnreadableImageError:
        return 0  # a worker will raise it again
    images.close()
    size = sum(field.nbytes for field in fields if isinstance(field, torch.Tensor))
    return ahead * plan.per_device_batch * size // len(samples)
