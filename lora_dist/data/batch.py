"""Batches of tensors, and the contract between worker processes and the device.

A worker process (`prepared`) reads, decodes and crops images. All random numbers are drawn there, from the seed, the
epoch and the sample. The worker resizes the images to views, 8-bit where the image processor allows that, and returns a
`Batch` with `deferred` operations. After the copy, the training process (`finished`) applies these on the device:

1. resizing and flipping of crops, only with `--augment_on_device`;
2. the processor's rescaling, normalisation and channel order;
3. random erasing, and black views for images that cannot be read;
4. mixup or CutMix.

`loader.batches` calls both. 8-bit views are a quarter of the bytes to transfer.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_dist.data.pixels.deferred import DeferredOps
from lora_dist.data.pixels.images import UnreadableImageError, opened
from lora_dist.data.pixels.mixing import NOWHERE, Mixture, draw_mixture
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.pixels.views import View, black, stack
from lora_dist.data.sampling.order import PADDING_INDEX, Sample
from lora_dist.data.sampling.training_split import EncodedSample, Reader, TrainingSplit
from lora_dist.data.sources.split import Split
from lora_dist.settings.train import AugmentationSettings

logger = logging.getLogger(__name__)
Key = TypeVar("Key")


class Batch(NamedTuple):
    """A micro-batch.

    Attributes:
        pixel_values: float32 [B, 3, H, W]; views as `views.stack` gives them while there are `deferred` operations.
        labels: int64 [B]; of several labels, 0 and 1 as uint8 [B, labels].
        weights: float32 [B], 1 or 0; a sample of weight 0 only keeps the processes in step.
        indices: int64 [B], in the split.
        partner_labels: as `labels`, of the partners; None without mixing.
        shares: float32 [B], weight of `labels` against `partner_labels`; None without mixing.
        unreadable: bool [B], samples of weight 0 whose image could not be read; None where such an image ends the run.
        deferred: operations for the device; None once they are applied.
    """

    pixel_values: Tensor
    labels: Tensor
    weights: Tensor
    indices: Tensor
    partner_labels: Tensor | None = None
    shares: Tensor | None = None
    unreadable: Tensor | None = None
    deferred: DeferredOps | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy overlaps the host where memory is pinned."""
        moved = (None if field is None else field.to(device, non_blocking=True) for field in self)
        return Batch(*moved)  # type: ignore[arg-type]  # only the optional fields can be None


class WorkerShard(NamedTuple):
    """The samples of a micro-batch that one worker process prepares.

    Attributes:
        content: samples before fetching, a `Batch` after; None for a worker without samples.
        positions: of the samples in the micro-batch, int64 [B].
        num_shards: shards that make up the micro-batch.
    """

    content: Any
    positions: Tensor
    num_shards: int


class _Images(Dataset):
    """Base class of the training and the evaluation images.

    An unreadable image raises an error. With `skip_bad_images` it gets weight 0, and each process logs it once.
    """

    def __init__(self, split: Any, transforms: ImageTransforms, skip_bad_images: bool = False) -> None:
        self.split = split
        self.transforms = transforms
        self._size = transforms.height, transforms.width
        self._skip = skip_bad_images
        self._logged: set[str] = set()

    def __len__(self) -> int:
        return len(self.split)

    def finished(self, batch: Batch) -> Batch:
        """Applies the deferred operations, on the device that the batch is on."""
        assert batch.deferred is not None
        pixels = self.transforms.model_input(batch.pixel_values, batch.deferred)
        return batch._replace(pixel_values=pixels, deferred=None)

    def _resized(self, images: Mapping[int, Key], load: Callable[[Key], Image.Image]) -> dict[int, Tensor]:
        """`ImageTransforms.resized` by index, without images that are skipped; decodes one image at a time."""
        readable: list[int] = []

        def decoded() -> Iterator[Image.Image]:
            for index, key in images.items():
                with self._skipping():
                    image = load(key)
                    readable.append(index)
                    yield image

        return dict(zip(readable, self.transforms.resized(decoded()), strict=True))

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        try:
            yield
        except UnreadableImageError as error:
            if not self._skip:
                raise
            if str(error) not in self._logged:
                self._logged.add(str(error))
                logger.error("skipped an image that cannot be read: %s", error)


class TrainImages(_Images):
    """Random views of the training split, fetched a micro-batch, or a worker's shard of one, at a time."""

    split: TrainingSplit

    def __init__(
        self,
        split: TrainingSplit,
        transforms: ImageTransforms,
        augmentation: AugmentationSettings,
        seed: int,
        skip_bad_images: bool = False,
    ) -> None:
        super().__init__(split, transforms, skip_bad_images)
        self._reader: Reader | None = None
        self._no_label = np.zeros(split.label_shape, np.uint8) if split.label_shape else 0
        self.mixing = (augmentation.mixup_alpha, augmentation.cutmix_alpha)
        self.seed = seed

    def __getitems__(self, shard: WorkerShard) -> WorkerShard | UnreadableImageError:
        try:
            return shard._replace(content=self.prepared(shard.content) if shard.content else None)
        except UnreadableImageError as error:
            return error

    def close(self) -> None:
        """Drops samples that were read ahead, so that worker processes do not inherit them."""
        self._reader = None

    def batch(self, samples: list[Sample]) -> Batch:
        """The micro-batch of `samples`, which are of one epoch; raises `UnreadableImageError`."""
        return self.finished(self.prepared(samples))

    def padding_batch(self, device: torch.device) -> Batch:
        """A micro-batch of one black image of weight 0."""
        return self.finished(self.prepared([Sample(0, PADDING_INDEX, 0, PADDING_INDEX, 0.0)]).to(device))

    def prepared(self, samples: list[Sample]) -> Batch:
        """The part of `batch` that a worker process does."""
        epoch, pairs = samples[0].epoch, any(self.mixing)
        wanted = dict.fromkeys(index for sample in samples for index in (sample.index, sample.partner)[: 1 + pairs])
        if samples[0].index == PADDING_INDEX:
            encoded: Mapping[int, EncodedSample] = {PADDING_INDEX: EncodedSample(None, "", self._no_label)}
            views: dict[int, View] = {}
        else:
            if self._reader is None:
                self._reader = self.split.reader()
            encoded = self._reader.read(epoch, list(wanted))
            views = self._views(encoded, epoch)
        blank = black(next(iter(views.values()), None), self._size)
        # A sample whose partner cannot be read is mixed with itself, which leaves it unchanged.
        partners = [
            sample.partner if {sample.index, sample.partner} <= views.keys() else sample.index for sample in samples
        ]
        # Views of the samples come first, then those of partners that are not samples here.
        indices = [sample.index for sample in samples]
        viewed = indices + [index for index in wanted if index not in set(indices)]
        number_of = {index: number for number, index in enumerate(viewed)}
        mixtures = [self.mixture(epoch, sample) for sample in samples] if pairs else []
        pixels, deferred = stack(
            [views.get(index, blank) for index in viewed],
            [number_of[partner] for partner in partners] if pairs else [],
            mixtures,
        )
        unreadable = [sample.weight > 0 and sample.index not in views for sample in samples]
        return Batch(
            pixel_values=pixels,
            labels=_stacked([encoded[index].label for index in indices]),
            weights=torch.tensor([sample.weight if sample.index in views else 0.0 for sample in samples]),
            indices=torch.tensor(indices),
            partner_labels=_stacked([encoded[partner].label for partner in partners]) if pairs else None,
            shares=torch.tensor([mixture.lam for mixture in mixtures]) if pairs else None,
            unreadable=torch.tensor(unreadable) if self._skip else None,
            deferred=deferred,
        )

    def _views(self, encoded: Mapping[int, EncodedSample], epoch: int) -> dict[int, View]:
        """Augmented views by index, without images that are skipped."""
        if not self.transforms.crops:
            wholes = self._resized(encoded, lambda one: self.transforms.load(one.source, one.name))
            return {
                index: self.transforms.whole_view(pixels, (self.seed, epoch, index)) for index, pixels in wholes.items()
            }
        views = {}
        for index, one in encoded.items():
            with self._skipping(), opened(one.source, one.name, self.transforms.conversion) as picture:
                views[index] = self.transforms.view(picture, (self.seed, epoch, index))
        return views

    def mixture(self, epoch: int, sample: Sample) -> Mixture:
        """Draws the ratio and the area with which a sample is mixed with its partner; for `mixing` above 0."""
        if sample.index == PADDING_INDEX:
            return Mixture(1.0, NOWHERE, 1.0)
        return draw_mixture(*self.mixing, self._size, (self.seed, epoch, sample.index, sample.position))


def _stacked(labels: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(labels))


class EvaluationImages(_Images):
    """The validation split, fetched a batch at a time."""

    split: Split

    def __getitems__(self, indices: list[int]) -> Batch | UnreadableImageError:
        shown = [max(index, 0) for index in indices]
        try:
            pixels_of = self._resized({index: index for index in shown}, self._decoded)
        except UnreadableImageError as error:
            return error
        views = {index: View(pixels) for index, pixels in pixels_of.items()}
        blank = black(next(iter(views.values()), None), self._size)
        pixels, deferred = stack([views.get(index, blank) for index in shown])
        valid = torch.tensor([index in views for index in indices])
        return Batch(
            pixel_values=pixels,
            labels=torch.from_numpy(self.split.labels[shown]),
            weights=valid.float(),
            indices=torch.tensor(indices).where(valid, PADDING_INDEX),
            deferred=deferred,
        )

    def _decoded(self, index: int) -> Image.Image:
        sample = self.split.read(0, [index])[index]
        return self.transforms.load(sample.source, sample.name)
