"""Batches from worker processes, in the order that `order` prescribes."""

import os
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from lora_dist.data.batch import Batch, EvaluationImages, TrainImages, WorkerShard
from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import BatchPlan, MicroBatches, Sample, evaluation_batches
from lora_dist.data.sources.split import Split
from lora_dist.errors import ProcessError
from lora_dist.processes.workers import from_workers, worker_loader
from lora_dist.settings.train import DataSettings

CPU = torch.device("cpu")
MEASURED_SAMPLES = 8


class WorkerBatchSampler(Sampler[WorkerShard]):
    """The micro-batches of a process, cut up for its workers, for a `DataLoader`'s `batch_sampler`.

    A `DataLoader` gives what its batch sampler yields to its workers in turn. So where samples are in lanes, each
    micro-batch comes in as many parts as there are workers, and each lane is read by one of them alone.
    """

    def __init__(self, micro_batches: Iterable[list[Sample]], workers: int) -> None:
        self.micro_batches = micro_batches
        self.workers = max(workers, 1)

    def __iter__(self) -> Iterator[WorkerShard]:
        for samples in self.micro_batches:
            lanes = [sample.lane for sample in samples]
            if self.workers == 1 or lanes[0] is None:
                yield WorkerShard(samples, torch.arange(len(samples)), 1)
                continue
            for worker in range(self.workers):
                indices = [index for index, lane in enumerate(lanes) if (lane or 0) % self.workers == worker]
                yield WorkerShard(
                    [samples[index] for index in indices], torch.tensor(indices, dtype=torch.int64), self.workers
                )


def train_loader(
    images: TrainImages, order: BatchPlan, first_step: int, last_step: int, settings: DataSettings, device: torch.device
) -> DataLoader:
    """All micro-batches of this process for updates `first_step` to `last_step`, in one pass over all epochs."""
    workers = workers_of(settings, device)
    return worker_loader(
        images,
        batch_sampler=WorkerBatchSampler(MicroBatches(order, first_step, last_step), workers),
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
    """This process's part of the validation split. Its workers stay from one evaluation to the next."""
    batches = evaluation_batches(len(split), batch_size, world_size, rank)
    return worker_loader(
        EvaluationImages(split, transforms, settings.on_bad_image == "skip"),
        batch_sampler=batches,
        workers=min(workers_of(settings, device), len(batches)),
        prefetch_factor=settings.dataloader_prefetch_factor,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def batches(loader: DataLoader, device: torch.device = CPU) -> Generator[Batch]:
    """The batches of a loader, on `device`, where what its workers have left to do is done.

    Raises:
        ProcessError: names an image that cannot be read.
    """
    images: Any = loader.dataset
    shards: list[WorkerShard] = []
    for found in from_workers(loader):
        if isinstance(found, UnreadableImageError):
            raise unreadable(found)
        if isinstance(found, WorkerShard):
            content = found.content
            shards.append(found if content is None else found._replace(content=images.finished(content.to(device))))
            if len(shards) == found.num_shards:
                yield _together(shards, device)
                shards = []
        else:
            yield images.finished(found.to(device))


def unreadable(error: UnreadableImageError) -> ProcessError:
    """What a run ends with at an image that cannot be read."""
    return ProcessError(
        f"cannot read an image of the data set: {error}. Repair it, take it out, or leave out whatever cannot be read "
        "by --on_bad_image skip."
    )


def _together(shards: list[WorkerShard], device: torch.device) -> Batch:
    """The samples of all shards by their positions in the micro-batch, whatever the number of workers."""
    filled = [shard for shard in shards if shard.content is not None]
    if len(filled) == 1:
        return filled[0].content
    order = torch.cat([shard.positions for shard in filled]).argsort().to(device)
    fields = zip(*(shard.content for shard in filled), strict=True)
    together = (None if field[0] is None else torch.cat(field)[order] for field in fields)
    return Batch(*together)  # type: ignore[arg-type]  # only the optional fields can be None


def workers_of(settings: DataSettings, device: torch.device) -> int:
    """Worker processes of a loader."""
    workers = settings.dataloader_num_workers
    return default_workers(device) if workers is None else workers


def default_workers(device: torch.device) -> int:
    """Workers for a process: its share of the cores, at most 16; none where the CPU itself does the training."""
    if device.type == "cpu":
        return 0
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_processes - 1))


def bytes_ahead(images: TrainImages, order: BatchPlan, step: int, settings: DataSettings, device: torch.device) -> int:
    """Bytes of the batches that the workers of a process have ready, at the most.

    The first samples of update `step` (from 0) are prepared, to see how large they are.
    """
    ahead = workers_of(settings, device) * settings.dataloader_prefetch_factor
    if not ahead:
        return 0
    samples = next(order.micro_batches(step))[:MEASURED_SAMPLES]
    try:
        fields = images.prepared(samples)
    except UnreadableImageError:
        return 0  # a worker will come to it, and name it
    images.close()
    size = sum(field.nbytes for field in fields if isinstance(field, torch.Tensor))
    return ahead * order.per_device_batch * size // len(samples)
