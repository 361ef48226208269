"""Batches from worker processes, in the order that `order` prescribes."""

import gc
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_dist.config import DataSettings
from lora_dist.data.batch import Batch, EvaluationImages, Part, TrainImages
from lora_dist.data.dataset import Split
from lora_dist.data.images import UnreadableImageError
from lora_dist.data.order import MicroBatches, Order, Sample, evaluation_batches
from lora_dist.data.transforms import ImageTransforms
from lora_dist.errors import ProcessError
from lora_dist.processes.preemption import ignore_signals

CPU = torch.device("cpu")


class Parts(Sampler[Part]):
    """The micro-batches of a process, cut up for its workers, for a `DataLoader`'s `batch_sampler`.

    A `DataLoader` gives what its batch sampler yields to its workers in turn. So where samples are in lanes, each
    micro-batch comes in as many parts as there are workers, and each lane is read by one of them alone.
    """

    def __init__(self, micro_batches: Iterable[list[Sample]], workers: int) -> None:
        self.micro_batches = micro_batches
        self.workers = max(workers, 1)

    def __iter__(self) -> Iterator[Part]:
        for samples in self.micro_batches:
            lanes = [sample.lane for sample in samples]
            if self.workers == 1 or lanes[0] is None:
                yield Part(samples, torch.arange(len(samples)), 1)
                continue
            for worker in range(self.workers):
                places = [place for place, lane in enumerate(lanes) if (lane or 0) % self.workers == worker]
                yield Part([samples[place] for place in places], torch.tensor(places, dtype=torch.int64), self.workers)


def train_loader(
    images: TrainImages, order: Order, first_step: int, last_step: int, settings: DataSettings, device: torch.device
) -> DataLoader:
    """All micro-batches of this process for updates `first_step` to `last_step`, in one pass over all epochs."""
    workers = workers_of(settings, device)
    return _loader(images, Parts(MicroBatches(order, first_step, last_step), workers), workers, settings, device)


def evaluation_loader(
    split: Split,
    transforms: ImageTransforms,
    batch_size: int,
    world_size: int,
    rank: int,
    settings: DataSettings,
    device: torch.device,
) -> DataLoader:
    """This process's part of the validation split."""
    batches = evaluation_batches(len(split), batch_size, world_size, rank)
    images = EvaluationImages(split, transforms, settings.on_bad_image == "skip")
    return _loader(images, batches, workers_of(settings, device), settings, device)


def batches(loader: DataLoader, device: torch.device = CPU) -> Iterator[Batch]:
    """The batches of a loader, on `device`, where what its workers have left to do is done.

    Raises:
        ProcessError: names an image that cannot be read.
    """
    images: Any = loader.dataset
    parts: list[Part] = []
    for found in loader:
        if isinstance(found, UnreadableImageError):
            raise unreadable(found)
        if isinstance(found, Part):
            content = found.content
            parts.append(found if content is None else found._replace(content=images.finished(content.to(device))))
            if len(parts) == found.parts:
                yield _together(parts, device)
                parts = []
        else:
            yield images.finished(found.to(device))


def unreadable(error: UnreadableImageError) -> ProcessError:
    """What a run ends with at an image that cannot be read."""
    return ProcessError(
        f"cannot read an image of the data set: {error}. Repair it, take it out, or leave out whatever cannot be read "
        "by --on_bad_image skip."
    )


def _together(parts: list[Part], device: torch.device) -> Batch:
    """The samples of all parts in the order of their places, which no number of workers changes."""
    filled = [part for part in parts if part.content is not None]
    if len(filled) == 1:
        return filled[0].content
    order = torch.cat([part.places for part in filled]).argsort().to(device)
    fields = zip(*(part.content for part in filled), strict=True)
    together = (None if field[0] is None else torch.cat(field)[order] for field in fields)
    return Batch(*together)  # type: ignore[arg-type]  # only the optional fields can be None


def workers_of(settings: DataSettings, device: torch.device) -> int:
    """Worker processes of a loader."""
    workers = settings.dataloader_num_workers
    return default_workers(device) if workers is None else workers


def _loader(
    dataset: Dataset, batch_sampler: Any, workers: int, settings: DataSettings, device: torch.device
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=set_up_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=settings.dataloader_prefetch_factor if workers else None,
        generator=torch.Generator(),
    )


def default_workers(device: torch.device) -> int:
    """Workers for a process: its share of the cores, at most 16; none where the CPU itself does the training."""
    if device.type == "cpu":
        return 0
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(16, len(os.sched_getaffinity(0)) // local_processes - 1))


def set_up_worker(worker: int) -> None:
    """For `worker_init_fn`: what a worker process does first."""
    ignore_signals()
    # What was garbage at the fork is not for a worker to end: a store's destructor joins a thread that stayed behind.
    gc.freeze()


def _as_is(batch: Any) -> Any:
    return batch
