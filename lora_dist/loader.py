"""Splits to batches of tensors, prepared by worker processes in the order that `order` prescribes."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lora_dist.config import AugmentationSettings, DataSettings
from lora_dist.data import Split
from lora_dist.errors import ProcessError
from lora_dist.images import UnreadableImageError
from lora_dist.order import FILLER, MicroBatches, Order, Sample, evaluation_batches
from lora_dist.preemption import ignore_signals
from lora_dist.transforms import ImageTransforms, mix_pair


class Batch(NamedTuple):
    """A micro-batch.

    Attributes:
        pixel_values: float32 [B, 3, H, W].
        labels: int64 [B].
        weights: float32 [B], 1 or 0; a sample of weight 0 only keeps the processes in step.
        indices: int64 [B], rows of the split.
        partner_labels: int64 [B], class of what was mixed in; None without mixing.
        shares: float32 [B], share of `labels`; None without mixing.
    """

    pixel_values: Tensor
    labels: Tensor
    weights: Tensor
    indices: Tensor
    partner_labels: Tensor | None = None
    shares: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy overlaps the host where memory is pinned."""
        moved = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)
        return Batch(*moved)  # type: ignore[arg-type]  # only the optional fields can be None


class TrainImages(Dataset):
    """Random views of the training split, fetched a micro-batch at a time."""

    def __init__(self, split: Split, transforms: ImageTransforms, augmentation: AugmentationSettings, seed: int):
        self.split = split
        self.transforms = transforms
        self.mixup_alpha = augmentation.mixup_alpha
        self.cutmix_alpha = augmentation.cutmix_alpha
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, samples: list[Sample]) -> Batch | UnreadableImageError:
        try:
            return self.batch(samples)
        except UnreadableImageError as error:
            return error

    def batch(self, samples: list[Sample]) -> Batch:
        """The micro-batch of `samples`; raises `UnreadableImageError`."""
        labels = self.split.labels
        views: dict[tuple[int, int], Tensor] = {}

        def view(epoch: int, index: int) -> Tensor:
            if (epoch, index) not in views:
                views[epoch, index] = self.transforms.training(self.split.image(index), (self.seed, epoch, index))
            return views[epoch, index]

        indices = [sample.row for sample in samples]
        batch = Batch(
            pixel_values=torch.stack([view(sample.epoch, sample.row) for sample in samples]),
            labels=torch.from_numpy(labels[indices]),
            weights=torch.tensor([sample.weight for sample in samples]),
            indices=torch.tensor(indices),
        )
        if not (self.mixup_alpha or self.cutmix_alpha):
            return batch
        mixed = [
            mix_pair(
                view(sample.epoch, sample.row),
                view(sample.epoch, sample.partner),
                self.mixup_alpha,
                self.cutmix_alpha,
                (self.seed, sample.epoch, sample.row, sample.position),
            )
            for sample in samples
        ]
        return batch._replace(
            pixel_values=torch.stack([image for image, _ in mixed]),
            partner_labels=torch.from_numpy(labels[[sample.partner for sample in samples]]),
            shares=torch.tensor([share for _, share in mixed]),
        )


class EvaluationImages(Dataset):
    """The validation split as the processor makes it, fetched a batch at a time."""

    def __init__(self, split: Split, transforms: ImageTransforms) -> None:
        self.split = split
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> Batch | UnreadableImageError:
        try:
            pixels = torch.stack([self.transforms.evaluation(self.split.image(max(row, 0))) for row in indices])
        except UnreadableImageError as error:
            return error
        return Batch(
            pixel_values=pixels,
            labels=torch.from_numpy(self.split.labels[[max(row, 0) for row in indices]]),
            weights=torch.tensor([float(row != FILLER) for row in indices]),
            indices=torch.tensor(indices),
        )


def train_loader(
    images: TrainImages, order: Order, first_step: int, last_step: int, settings: DataSettings, device: torch.device
) -> DataLoader:
    """All micro-batches of this process for updates `first_step` to `last_step`, in one pass over all epochs."""
    return _loader(images, MicroBatches(order, first_step, last_step), settings, device)


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
    return _loader(EvaluationImages(split, transforms), batches, settings, device)


def batches(loader: DataLoader) -> Iterator[Batch]:
    """The batches of a loader.

    Raises:
        ProcessError: names an image that cannot be read.
    """
    for batch in loader:
        if isinstance(batch, UnreadableImageError):
            raise ProcessError(f"cannot read an image of the data set: {batch}. Repair it or take it out.")
        yield batch


def _loader(dataset: Dataset, batch_sampler: Any, settings: DataSettings, device: torch.device) -> DataLoader:
    workers = settings.dataloader_num_workers
    if workers is None:
        workers = default_workers(device)
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=_set_up_worker,
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


def _set_up_worker(worker: int) -> None:
    ignore_signals()


def _as_is(batch: Any) -> Any:
    return batch
