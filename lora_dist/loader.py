"""Splits to batches of tensors, prepared by worker processes in the order that `order` prescribes."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_dist.config import AugmentationSettings, DataSettings
from lora_dist.data import Split
from lora_dist.errors import ProcessError
from lora_dist.images import UnreadableImageError, load_rgb
from lora_dist.order import FILLER, MicroBatches, Order, Sample, evaluation_batches
from lora_dist.preemption import ignore_signals
from lora_dist.splits import Reader, TrainingSplit
from lora_dist.transforms import ImageTransforms, mix_pair

CPU = torch.device("cpu")


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


class Part(NamedTuple):
    """What one worker process contributes to a micro-batch: the samples of its lanes.

    Attributes:
        content: the samples, or once they are fetched the batch of them; None where there are none.
        places: places of the samples in the micro-batch, shape [B].
        parts: number of parts of the micro-batch.
    """

    content: Any
    places: Tensor
    parts: int


class TrainImages(Dataset):
    """Random views of the training split, fetched a micro-batch, or a part of one, at a time."""

    def __init__(
        self, split: TrainingSplit, transforms: ImageTransforms, augmentation: AugmentationSettings, seed: int
    ) -> None:
        self.split = split
        self._reader: Reader | None = None
        self.transforms = transforms
        self.mixup_alpha = augmentation.mixup_alpha
        self.cutmix_alpha = augmentation.cutmix_alpha
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, part: Part) -> Part | UnreadableImageError:
        try:
            return part._replace(content=self.batch(part.content) if part.content else None)
        except UnreadableImageError as error:
            return error

    def close(self) -> None:
        """Lets go of what has been read ahead, so that worker processes do not inherit it."""
        self._reader = None

    def batch(self, samples: list[Sample]) -> Batch:
        """The micro-batch of `samples`, which are of one epoch; raises `UnreadableImageError`."""
        mixing = bool(self.mixup_alpha or self.cutmix_alpha)
        if samples[0].row == FILLER:
            return self._filler(mixing)
        if self._reader is None:
            self._reader = self.split.reader()
        epoch = samples[0].epoch
        rows = [row for sample in samples for row in ((sample.row, sample.partner) if mixing else (sample.row,))]
        encoded = self._reader.read(epoch, rows)
        views = {
            row: self.transforms.training(load_rgb(one.source, one.name), (self.seed, epoch, row))
            for row, one in encoded.items()
        }
        batch = Batch(
            pixel_values=torch.stack([views[sample.row] for sample in samples]),
            labels=torch.tensor([encoded[sample.row].label for sample in samples]),
            weights=torch.tensor([sample.weight for sample in samples]),
            indices=torch.tensor([sample.row for sample in samples]),
        )
        if not mixing:
            return batch
        mixed = [
            mix_pair(
                views[sample.row],
                views[sample.partner],
                self.mixup_alpha,
                self.cutmix_alpha,
                (self.seed, epoch, sample.row, sample.position),
            )
            for sample in samples
        ]
        return batch._replace(
            pixel_values=torch.stack([image for image, _ in mixed]),
            partner_labels=torch.tensor([encoded[sample.partner].label for sample in samples]),
            shares=torch.tensor([share for _, share in mixed]),
        )

    def _filler(self, mixing: bool) -> Batch:
        """A black image of no weight."""
        return Batch(
            pixel_values=torch.zeros(1, 3, self.transforms.height, self.transforms.width),
            labels=torch.tensor([0]),
            weights=torch.tensor([0.0]),
            indices=torch.tensor([FILLER]),
            partner_labels=torch.tensor([0]) if mixing else None,
            shares=torch.tensor([1.0]) if mixing else None,
        )


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
    workers = _workers(settings, device)
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
    return _loader(EvaluationImages(split, transforms), batches, _workers(settings, device), settings, device)


def batches(loader: DataLoader, device: torch.device = CPU) -> Iterator[Batch]:
    """The batches of a loader. Those that come in parts are put together on `device`.

    Raises:
        ProcessError: names an image that cannot be read.
    """
    parts: list[Part] = []
    for found in loader:
        if isinstance(found, UnreadableImageError):
            raise ProcessError(f"cannot read an image of the data set: {found}. Repair it or take it out.")
        if isinstance(found, Part):
            parts.append(found)
            if len(parts) == found.parts:
                yield _together(parts, device)
                parts = []
        else:
            yield found


def _together(parts: list[Part], device: torch.device) -> Batch:
    """The samples of all parts in the order of their places, which no number of workers changes."""
    filled = [part for part in parts if part.content is not None]
    if len(filled) == 1:
        return filled[0].content
    order = torch.cat([part.places for part in filled]).argsort().to(device)
    fields = zip(*(part.content.to(device) for part in filled), strict=True)
    together = (None if field[0] is None else torch.cat(field)[order] for field in fields)
    return Batch(*together)  # type: ignore[arg-type]  # only the optional fields can be None


def _workers(settings: DataSettings, device: torch.device) -> int:
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
