"""Samples of a split to a batch of tensors, as the worker processes of a loader make it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_dist.data.pixels.images import UnreadableImageError, load_rgb, opened
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.pixels.views import DeferredOps, Mixture, View, black, draw_mixture, stack
from lora_dist.data.sampling.order import PADDING_INDEX, Sample
from lora_dist.data.sampling.protocol import EncodedSample, Reader, TrainingSplit
from lora_dist.data.sources.split import Split
from lora_dist.settings.train import AugmentationSettings

logger = logging.getLogger(__name__)
Key = TypeVar("Key")


class Batch(NamedTuple):
    """A micro-batch.

    Attributes:
        pixel_values: float32 [B, 3, H, W]; as long as there is a `rest`, views as `views.stack` gives them.
        labels: int64 [B].
        weights: float32 [B], 1 or 0; a sample of weight 0 only keeps the processes in step.
        indices: int64 [B], rows of the split.
        partner_labels: int64 [B], class of what was mixed in; None without mixing.
        shares: float32 [B], share of `labels`; None without mixing.
        unreadable: bool [B], samples of weight 0 whose image could not be read and is black here; None where such an
            image ends the run.
        rest: what is left to do with the views; None where nothing is.
    """

    pixel_values: Tensor
    labels: Tensor
    weights: Tensor
    indices: Tensor
    partner_labels: Tensor | None = None
    shares: Tensor | None = None
    unreadable: Tensor | None = None
    rest: DeferredOps | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the copy overlaps the host where memory is pinned."""
        moved = (None if field is None else field.to(device, non_blocking=True) for field in self)
        return Batch(*moved)  # type: ignore[arg-type]  # only the optional fields can be None


class WorkerShard(NamedTuple):
    """The samples of a micro-batch that one worker process prepares.

    Attributes:
        content: samples before fetching, a `Batch` after; None for a worker without samples.
        positions: positions of the samples in the micro-batch, int64 [B].
        num_shards: shards that make up the micro-batch.
    """

    content: Any
    positions: Tensor
    num_shards: int


class TrainImages(Dataset):
    """Random views of the training split, fetched a micro-batch, or a part of one, at a time."""

    def __init__(
        self,
        split: TrainingSplit,
        transforms: ImageTransforms,
        augmentation: AugmentationSettings,
        seed: int,
        skip_bad_images: bool = False,
    ) -> None:
        """
        Args:
            split: to read from.
            transforms: of the model's processor.
            augmentation: which mixing there is.
            seed: of the views.
            skip_bad_images: give an image that cannot be read no weight, rather than to raise.
        """
        self.split = split
        self._reader: Reader | None = None
        self.transforms = transforms
        self._size = transforms.height, transforms.width
        self.mixing = (augmentation.mixup_alpha, augmentation.cutmix_alpha)
        self.seed = seed
        self._bad = BadImages(skip_bad_images)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, part: WorkerShard) -> WorkerShard | UnreadableImageError:
        try:
            return part._replace(content=self.prepared(part.content) if part.content else None)
        except UnreadableImageError as error:
            return error

    def close(self) -> None:
        """Lets go of what has been read ahead, so that worker processes do not inherit it."""
        self._reader = None

    def batch(self, samples: list[Sample]) -> Batch:
        """The micro-batch of `samples`, which are of one epoch; raises `UnreadableImageError`."""
        return self.finished(self.prepared(samples))

    def finished(self, batch: Batch) -> Batch:
        """What `prepared` has left to do, on the device that the batch is on."""
        assert batch.rest is not None
        return batch._replace(pixel_values=self.transforms.model_input(batch.pixel_values, batch.rest), rest=None)

    def padding_batch(self, device: torch.device) -> Batch:
        """A micro-batch of one black image of no weight, as the model takes it."""
        return self.finished(self._padding_batch().to(device))

    def prepared(self, samples: list[Sample]) -> Batch:
        """The part of `batch` that a worker process does."""
        if samples[0].row == PADDING_INDEX:
            return self._padding_batch()
        if self._reader is None:
            self._reader = self.split.reader()
        epoch, pairs = samples[0].epoch, any(self.mixing)
        read = dict.fromkeys(row for sample in samples for row in (sample.row, sample.partner)[: 1 + pairs])
        encoded = self._reader.read(epoch, list(read))
        known = self._views(encoded, epoch)
        blank = black(next(iter(known.values()), None), self._size)
        # Where one of a pair cannot be read, the other is mixed with itself: that leaves it as it is.
        partners = [
            sample.partner if {sample.row, sample.partner} <= known.keys() else sample.row for sample in samples
        ]
        # The views of the samples come first, and then those of partners that are no samples here.
        own = {sample.row for sample in samples}
        rows = [sample.row for sample in samples] + [row for row in read if row not in own]
        index_of = {row: index for index, row in enumerate(rows)}
        mixtures = [self._mixture(epoch, sample) for sample in samples] if pairs else []
        pixels, rest = stack(
            [known.get(row, blank) for row in rows],
            [index_of[partner] for partner in partners] if pairs else [],
            mixtures,
        )
        return Batch(
            pixel_values=pixels,
            labels=torch.tensor([encoded[sample.row].label for sample in samples]),
            weights=torch.tensor([sample.weight if sample.row in known else 0.0 for sample in samples]),
            indices=torch.tensor([sample.row for sample in samples]),
            partner_labels=torch.tensor([encoded[partner].label for partner in partners]) if pairs else None,
            shares=torch.tensor([mixture.lam for mixture in mixtures]) if pairs else None,
            unreadable=self._marks([sample.weight > 0 and sample.row not in known for sample in samples]),
            rest=rest,
        )

    def _views(self, encoded: Mapping[int, EncodedSample], epoch: int) -> dict[int, View]:
        """Images as augmented, without those that cannot be read and may be left out."""
        if not self.transforms.cuts_out:
            wholes = _resized(self.transforms, encoded, lambda one: load_rgb(one.source, one.name), self._bad)
            return {row: self.transforms.whole_view(pixels, (self.seed, epoch, row)) for row, pixels in wholes.items()}
        views = {}
        for row, one in encoded.items():
            with self._bad.left_out(), opened(one.source, one.name) as picture:
                views[row] = self.transforms.view(picture, (self.seed, epoch, row))
        return views

    def _mixture(self, epoch: int, sample: Sample) -> Mixture:
        return draw_mixture(*self.mixing, self._size, (self.seed, epoch, sample.row, sample.position))

    def _padding_batch(self) -> Batch:
        """A black image of no weight."""
        pixels, rest = stack([black(None, self._size)])
        return Batch(
            pixel_values=pixels,
            labels=torch.tensor([0]),
            weights=torch.tensor([0.0]),
            indices=torch.tensor([PADDING_INDEX]),
            partner_labels=torch.tensor([0]) if any(self.mixing) else None,
            shares=torch.tensor([1.0]) if any(self.mixing) else None,
            unreadable=self._marks([False]),
            rest=rest,
        )

    def _marks(self, unreadable: list[bool]) -> Tensor | None:
        return torch.tensor(unreadable) if self._bad.skip else None


class EvaluationImages(Dataset):
    """The validation split as the processor makes it, fetched a batch at a time."""

    def __init__(self, split: Split, transforms: ImageTransforms, skip_bad_images: bool = False) -> None:
        """
        Args:
            split: to read from.
            transforms: of the model's processor.
            skip_bad_images: give an image that cannot be read no weight, rather than to raise.
        """
        self.split = split
        self.transforms = transforms
        self._bad = BadImages(skip_bad_images)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> Batch | UnreadableImageError:
        rows = [max(row, 0) for row in indices]
        try:
            known = _resized(self.transforms, {row: row for row in rows}, self.split.image, self._bad)
        except UnreadableImageError as error:
            return error
        views = {row: View(pixels) for row, pixels in known.items()}
        blank = black(next(iter(views.values()), None), (self.transforms.height, self.transforms.width))
        pixels, rest = stack([views.get(row, blank) for row in rows])
        counts = [row in views for row in indices]
        return Batch(
            pixel_values=pixels,
            labels=torch.from_numpy(self.split.labels[rows]),
            weights=torch.tensor(counts, dtype=torch.float32),
            indices=torch.tensor([row if one else PADDING_INDEX for row, one in zip(indices, counts, strict=True)]),
            rest=rest,
        )

    def finished(self, batch: Batch) -> Batch:
        """What a worker process has left to do, on the device that the batch is on."""
        assert batch.rest is not None
        return batch._replace(pixel_values=self.transforms.model_input(batch.pixel_values, batch.rest), rest=None)


def _resized(
    transforms: ImageTransforms, images: Mapping[int, Key], load: Callable[[Key], Image.Image], bad: "BadImages"
) -> dict[int, Tensor]:
    """Images by row as the processor makes them, but for its last steps where these can wait, [3, H, W]; without those
    that cannot be read and may be left out. One is decoded when it is its turn."""
    readable: list[int] = []

    def decoded() -> Iterator[Image.Image]:
        for row, key in images.items():
            with bad.left_out():
                image = load(key)
                readable.append(row)
                yield image

    return dict(zip(readable, transforms.resized(decoded()), strict=True))


class BadImages:
    """What becomes of images that cannot be read: they end the run, or are left out and named, once in a process."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self._said: set[str] = set()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Raises the `UnreadableImageError` of this block, or takes note of it."""
        try:
            yield
        except UnreadableImageError as error:
            if not self.skip:
                raise
            if str(error) not in self._said:
                self._said.add(str(error))
                logger.error("left out, because it cannot be read: %s", error)
