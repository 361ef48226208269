"""RGB image to model input: the processor's own semantics for evaluation, random views in its format for training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lora_dist.config import AugmentationSettings
from lora_dist.errors import UserError

_AT_ONCE = 500_000
"""Pixels up to which images are resized in one call: a call costs as much as resizing a small image, and larger ones
no longer fit the CPU's cache."""


class ImageTransforms:
    """The transforms of a run.

    Training views are cropped and augmented as 8-bit RGB images, and then take the processor's own last steps
    (rescaling, normalisation, channel order), so that training and serving cannot drift apart.
    """

    def __init__(self, processor: Any, augmentation: AugmentationSettings | None = None) -> None:
        """
        Args:
            processor: the base model's image processor.
            augmentation: None where only evaluation is needed.

        Raises:
            UserError: the processor gives images of different sizes, which cannot be batched.
        """
        self.processor = processor
        self.height, self.width = _output_size(processor)
        self._augment: v2.Transform | None = None
        self._erase: v2.Transform | None = None
        if augmentation is not None:
            if augmentation.augmentation != "none":
                self._augment = _augmentation(augmentation, (self.height, self.width))
            if augmentation.random_erasing:
                self._erase = v2.RandomErasing(p=augmentation.random_erasing)

    def evaluation(self, image: Image.Image) -> Tensor:
        """Float32 [3, H, W], as the processor alone makes it."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as for evaluation, float32 [B, 3, H, W]."""
        return torch.stack([self.evaluation(image) for image in images])

    def resized(self, images: Sequence[Image.Image]) -> Tensor:
        """The first part of `batch`, for another process to do: 8-bit [B, 3, H, W] where the rest can wait.

        That is a quarter of the bytes to hand over, and the rest is cheaper for many images at once.
        """
        first = {"do_rescale": False, "do_normalize": False} if self._in_two_parts else {}
        parts: list[Tensor] = []
        group: list[Image.Image] = []
        pixels = 0
        for image in images:
            if group and pixels + image.width * image.height > _AT_ONCE:
                parts.append(self.processor(group, **first, return_tensors="pt")["pixel_values"])
                group, pixels = [], 0
            group.append(image)
            pixels += image.width * image.height
        parts.append(self.processor(group, **first, return_tensors="pt")["pixel_values"])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def finished(self, pixels: Tensor) -> Tensor:
        """The second part: what `resized` gave, float32 [B, 3, H, W], to the bit as `batch` makes it."""
        if not self._in_two_parts:
            return pixels
        return self.processor(pixels, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]

    @cached_property
    def _in_two_parts(self) -> bool:
        """Whether the processor gives the same bits in two parts; some also turn channels round, which is then done
        twice, or resize to floats."""
        pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 2 * self.width + 7, 3)).astype(np.uint8)
        images = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1].transpose(1, 0, 2))]
        try:
            first = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
            both = self.processor(first, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        except (TypeError, ValueError):
            return False
        return first.dtype == torch.uint8 and torch.equal(both, self.batch(images))

    def training(self, image: Image.Image, seed: tuple[int, ...]) -> Tensor:
        """A random view, float32 [3, H, W]; a function of the image and the seed alone."""
        with seeded(seed):
            if self._augment is None:
                pixels = self.evaluation(image)
            else:
                view = self._augment(image)
                pixels = self.processor(view, do_resize=False, do_center_crop=False, return_tensors="pt")
                pixels = pixels["pixel_values"][0]
            return self._erase(pixels) if self._erase is not None else pixels


def seed_of(numbers: tuple[int, ...]) -> int:
    """A 64-bit seed that depends on every one of `numbers`."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(numbers: tuple[int, ...]) -> Iterator[None]:
    """Runs torch's CPU random numbers from a seed of `numbers`, and puts the generator back as it was."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed_of(numbers))
    try:
        yield
    finally:
        generator.set_state(before)


def _output_size(processor: Any) -> tuple[int, int]:
    sizes = set()
    for shape in ((48, 64, 3), (64, 48, 3)):
        blank = Image.fromarray(np.zeros(shape, dtype=np.uint8))
        sizes.add(tuple(processor(blank, return_tensors="pt")["pixel_values"].shape[-2:]))
    if len(sizes) != 1:
        raise UserError(
            f"the image processor {type(processor).__name__} keeps each image's own shape, so images cannot be "
            f"batched; set a height and width, or a crop size, in its preprocessor_config.json"
        )
    return sizes.pop()


def _augmentation(settings: AugmentationSettings, size: tuple[int, int]) -> v2.Transform:
    steps: list[v2.Transform] = [v2.RandomResizedCrop(size, scale=(settings.crop_scale_min, 1.0), antialias=True)]
    if settings.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(p=settings.horizontal_flip))
    if settings.augmentation == "randaugment":
        steps.append(v2.RandAugment())
    if settings.augmentation == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    return v2.Compose(steps)


def mix_pair(
    first: Tensor, second: Tensor, mixup_alpha: float, cutmix_alpha: float, seed: tuple[int, ...]
) -> tuple[Tensor, float]:
    """Mixup (https://arxiv.org/abs/1710.09412) or CutMix (https://arxiv.org/abs/1905.04899) of two images.

    torchvision's batch-wise transforms mix with whatever else is in the batch, which changes with the number of
    processes; here the pair and the seed decide.

    Args:
        first: image [C, H, W] that gives at least its label's share.
        second: image of the same shape.
        mixup_alpha: of the Beta distribution; 0 for no mixup.
        cutmix_alpha: the same for CutMix; with both, one of them is drawn evenly.
        seed: decides everything random.

    Returns:
        The mixed image, and the share of `first` in it.
    """
    random = np.random.default_rng(seed)
    cut = bool(cutmix_alpha) and (not mixup_alpha or random.random() < 0.5)
    alpha = cutmix_alpha if cut else mixup_alpha
    share = float(random.beta(alpha, alpha))
    if not cut:
        return share * first + (1 - share) * second, share
    height, width = first.shape[-2:]
    cut_height, cut_width = int(height * (1 - share) ** 0.5), int(width * (1 - share) ** 0.5)
    top, left = int(random.integers(height - cut_height + 1)), int(random.integers(width - cut_width + 1))
    mixed = first.clone()
    box = (..., slice(top, top + cut_height), slice(left, left + cut_width))
    mixed[box] = second[box]
    return mixed, 1 - cut_height * cut_width / (height * width)
