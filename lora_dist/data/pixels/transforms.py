"""RGB images to model input: by the image processor itself for evaluation, as random views for training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.deferred import DeferredOps, combine, resize
from lora_dist.data.pixels.images import ImageSource, Picture, UnreadableImageError, load_rgb
from lora_dist.data.pixels.limits import CROPPED_RATIO, CentreCrop, TooLongError
from lora_dist.data.pixels.mixing import NOWHERE, Area
from lora_dist.data.pixels.processor import ProcessorError, processed
from lora_dist.data.pixels.views import View
from lora_dist.errors import UserError, first_line
from lora_dist.settings.train import AugmentationSettings

_POLICIES = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide}
_GROUP_PIXELS = 500_000
"""Largest number of pixels to resize in one call: a call costs as much as resizing a small image, and larger groups no
longer fit the CPU's cache."""


class ImageTransforms:
    """Image transforms of training, evaluation and prediction.

    Training views are cropped and augmented as 8-bit RGB images. The last steps (rescaling, normalisation, channel
    order) are the processor's own, so that training and serving cannot drift apart. With `crops`, a training view shows
    a random crop of its image.
    """

    def __init__(
        self,
        processor: Any,
        augmentation: AugmentationSettings | None = None,
        conversion: Conversion = AS_TRANSFORMERS,
    ) -> None:
        """`augmentation` is for training alone; `conversion` is kept for the decoding of images.

        Raises `UserError` if the processor does not make images of one size.
        """
        self.processor = processor
        self.conversion = conversion
        self.height, self.width = output_size(processor)
        settings = augmentation or AugmentationSettings(augmentation="none")
        self.crops = settings.augmentation != "none"
        self._random_crop = v2.RandomResizedCrop((self.height, self.width), scale=(settings.crop_scale_min, 1.0))
        self._flip = settings.horizontal_flip
        self._policy = _POLICIES[settings.augmentation]() if settings.augmentation in _POLICIES else None
        self._on_device = settings.augment_on_device
        self._erase = v2.RandomErasing(p=settings.random_erasing) if settings.random_erasing else None

    def load(self, source: ImageSource, name: str = "") -> Image.Image:
        """The image as `load_rgb` gives it, or the part that the processor keeps of a long and thin one.

        Raises `UnreadableImageError`, also for an image that is too long and thin to be resized.
        """
        return self.centred(load_rgb(source, name, self.conversion), name or str(source)[:200])

    def centred(self, image: Image.Image, name: str) -> Image.Image:
        """The part of a long and thin image that the processor keeps; otherwise the whole image. As `load`."""
        try:
            part = self._centre_crop(image)
        except TooLongError as error:
            raise UnreadableImageError(f"{name}: {error}") from error
        if max(part.size) > CROPPED_RATIO * min(part.size):
            try:
                processed(self.processor, part)
            except ProcessorError as error:  # where the longer side is fixed, the shorter one may become 0
                reason = (
                    f"{part.width} x {part.height} pixels are too long and thin for {type(self.processor).__name__}"
                )
                raise UnreadableImageError(f"{name}: {reason}: {error}") from error
        return part

    @cached_property
    def _centre_crop(self) -> CentreCrop:
        return CentreCrop(self.processor)

    def evaluation(self, image: Image.Image) -> Tensor:
        """Float32 [3, H, W], as the processor alone makes it."""
        return self.processor(self.centred(image, "image"), return_tensors="pt")["pixel_values"][0]

    def batch(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as for evaluation, float32 [B, 3, H, W]."""
        return torch.stack([self.evaluation(image) for image in images])

    def has_border(self) -> bool:
        """Whether the processor surrounds an image with a border, as for a crop that is larger than the resize."""
        made = self.evaluation(Image.new("RGB", (2 * self.width, 2 * self.height), "white"))
        return bool((made - made[:, self.height // 2, self.width // 2, None, None]).abs().max() > 1e-3)

    def resized(self, images: Iterable[Image.Image]) -> Tensor:
        """The first part of `batch`, for another process: 8-bit [B, 3, H, W] where the other steps can wait.

        8-bit pixels are a quarter of the bytes to transfer, and the other steps are cheaper for many images at once.
        """
        options = {"do_rescale": False, "do_normalize": False} if self._in_two_parts else {}
        parts = [
            self.processor(group, **options, return_tensors="pt")["pixel_values"] for group in self._groups(images)
        ]
        return torch.cat(parts) if parts else torch.empty(0, 3, self.height, self.width)

    def _groups(self, images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
        """Images in groups of `_GROUP_PIXELS`, each taken from the iterator only when its group needs it."""
        group: list[Image.Image] = []
        pixels = 0
        for image in images:
            more = self._centre_crop.resized_pixels(image.size)
            if group and pixels + more > _GROUP_PIXELS:
                yield group
                group, pixels = [], 0
            group.append(image)
            pixels += more
        if group:
            yield group

    def finished(self, pixels: Tensor) -> Tensor:
        """The second part of `batch`: makes float32 [B, 3, H, W], with the same bits, of the output of `resized`."""
        return self._normalised(pixels) if pixels.dtype == torch.uint8 else pixels

    def model_input(self, pixels: Tensor, deferred: DeferredOps) -> Tensor:
        """The samples of a batch from the views that `views.stack` gives, float32 [B, 3, H, W], on any device."""
        if deferred.crop_sizes is None:
            return combine(self.finished(pixels), deferred)
        return combine(self._normalised(resize(pixels, deferred.crop_sizes, (self.height, self.width))), deferred)

    def _normalised(self, values: Tensor) -> Tensor:
        """The processor's last steps for values from 0 to 255, [B, 3, H, W]."""
        if self._normalisation is None:
            return self._last_steps(values)
        mean, deviation = (_constant(numbers, values.device) for numbers in self._normalisation)
        return torch.empty(values.shape, device=values.device).copy_(values).sub_(mean).div_(deviation)

    def _last_steps(self, pixels: Tensor) -> Tensor:
        """Applies the processor to 8-bit images of the right size; returns float32 [B, 3, H, W]."""
        if self._takes_options:
            return self.processor(pixels, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        matrix, offset = (numbers.to(pixels.device) for numbers in self.affine_map)
        return torch.einsum("oi,bihw->bohw", matrix, pixels.float()) + offset[:, None, None]

    @cached_property
    def _takes_options(self) -> bool:
        """Whether the processor can leave out resizing and cropping; timm's transforms cannot."""
        pixels = torch.zeros(1, 3, self.height + 1, self.width, dtype=torch.uint8)
        try:
            made = processed(self.processor, pixels, do_resize=False, do_center_crop=False)
        except ProcessorError:
            return False
        return made.shape == pixels.shape

    @cached_property
    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Matrix [3, 3] and offset [3] of the last steps, measured on images of one colour, which resizing keeps.

        Raises `UserError` if the processor makes something else of such images.
        """

        def measured(*color: int) -> Tensor:
            made = self.evaluation(Image.new("RGB", (self.width, self.height), color)).double().flatten(1)
            same = bool((made - made[:, :1]).abs().max() <= 1e-5)
            return made[:, 0] if same else made[:, 0] * torch.nan

        offset = measured(0, 0, 0)
        matrix = torch.stack([measured(*(255 * (row == color) for row in range(3))) for color in range(3)], dim=1)
        matrix = (matrix - offset[:, None]) / 255
        grey = matrix @ torch.tensor([20.0, 130.0, 240.0], dtype=torch.float64) + offset
        if not (grey - measured(20, 130, 240)).abs().max() <= 1e-5:
            raise UserError(
                f"the image processor {type(self.processor).__name__} does more than resizing, cropping and "
                f"normalising, so random crops cannot go through it: train with --augmentation none"
            )
        return matrix.float(), offset.float()

    @cached_property
    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation of the channels that give each 8-bit value the same bits as the processor, several times
        faster; None for a processor that does something else."""
        values = torch.stack([(torch.arange(256) + 85 * channel) % 256 for channel in range(3)])
        pixels = values.to(torch.uint8).reshape(1, 3, 16, 16)
        try:
            scale = 1.0 / self.processor.rescale_factor
            mean, deviation = (
                (torch.tensor(numbers) * scale).expand(3).reshape(3, 1, 1)
                for numbers in (self.processor.image_mean, self.processor.image_std)
            )
            same = self._takes_options and torch.equal((pixels - mean) / deviation, self._last_steps(pixels))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return None
        return (tuple(mean.flatten().tolist()), tuple(deviation.flatten().tolist())) if same else None

    @cached_property
    def _in_two_parts(self) -> bool:
        """Whether the processor gives the same bits in two parts. Some reverse channels twice, or resize to floats."""
        if not self._takes_options:
            return False
        pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 2 * self.width + 7, 3)).astype(np.uint8)
        images = [Image.fromarray(pixels[0]), Image.fromarray(pixels[1].transpose(1, 0, 2))]
        try:
            first = processed(self.processor, images, do_rescale=False, do_normalize=False)
            both = processed(self.processor, first, do_resize=False, do_center_crop=False)
        except ProcessorError:
            return False
        return first.dtype == torch.uint8 and torch.equal(both, self.batch(images))

    def view(self, picture: Picture, seed: tuple[int, ...]) -> View:
        """A random view for `model_input`, from the picture and the seed alone; raises `UnreadableImageError`."""
        if not self.crops:
            return self.whole_view(self.resized([self.centred(picture.whole(), "image")])[0], seed)
        with seeded(seed):
            return self._crop(picture)._replace(erased=self._erased())

    def whole_view(self, pixels: Tensor, seed: tuple[int, ...]) -> View:
        """The same without a crop, from one of the images that `resized` gave, [3, H, W]."""
        with seeded(seed):
            return View(pixels, self._erased())

    def _crop(self, picture: Picture) -> View:
        size = self.height, self.width
        area = self._random_crop.make_params([torch.empty(3, *picture.size[::-1], device="meta")])
        box = (area["left"], area["top"], area["left"] + area["width"], area["top"] + area["height"])
        flipped = bool(self._flip and torch.rand(1) < self._flip)
        part = picture.part(box, size[::-1])
        # A large crop is resized in the worker all the same: it would take too long to transfer.
        large = min(part.shape[0] // size[0], part.shape[1] // size[1]) >= 2
        pixels = interpolated(part, size) if large or not self._on_device else _as_tensor(part)
        if self._on_device:
            return View(pixels[0], flipped=flipped)
        if flipped:
            pixels = pixels.flip(-1)
        if self._policy is not None:
            pixels = _as_tensor(np.array(self._policy(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()))))
        return View(pixels[0])

    def _erased(self) -> Area:
        if self._erase is None or torch.rand(1) >= self._erase.p:
            return NOWHERE
        area = self._erase.make_params([torch.empty(3, self.height, self.width, device="meta")])
        return NOWHERE if area["v"] is None else (area["i"], area["j"], area["h"], area["w"])


@lru_cache
def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """One number per channel as float32 [3, 1, 1]; copied to the device once, because each copy waits for the device.

    Not in `ImageTransforms`, which worker processes receive.
    """
    return torch.tensor(numbers).reshape(3, 1, 1).to(device)


def seed_of(numbers: tuple[int, ...]) -> int:
    """A 64-bit seed that depends on every one of `numbers`."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(numbers: tuple[int, ...]) -> Iterator[None]:
    """Seeds torch's CPU generator by `numbers`, and restores its state at the end."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed_of(numbers))
    try:
        yield
    finally:
        generator.set_state(before)


def output_size(processor: Any) -> tuple[int, int]:
    """Height and width of the images that a processor makes of RGB images of any shape.

    Raises `UserError` if it makes something else.
    """
    name, sizes = type(processor).__name__, []
    for shape in ((48, 64, 3), (64, 48, 3)):
        made = _prepared(processor, Image.fromarray(np.zeros(shape, dtype=np.uint8)))
        if not isinstance(made, Mapping) or "pixel_values" not in made:
            names = ", ".join(made) if isinstance(made, Mapping) else type(made).__name__
            raise UserError(
                f"the image processor {name} makes {names} of an image, not pixel_values: such models are not supported"
            )
        found = list(made["pixel_values"].shape[1:])
        if len(found) != 3 or found[0] != 3:
            raise UserError(
                f"the image processor {name} makes {found} of an image, not [3, height, width]; if the model takes "
                f"whole images of one size, name a processor that makes them with --image_processor_name. SigLIP 2 "
                f"NaFlex does not: take a checkpoint of a fixed resolution, such as google/siglip2-base-patch16-224"
            )
        sizes.append((found[1], found[2]))
    if sizes[0] != sizes[1]:
        (first, second), (third, fourth) = sizes
        raise UserError(
            f"the image processor {name} keeps each image's own shape ({first} x {second} or {third} x {fourth}), so "
            f"images cannot be batched; set a height and width, or a crop size, in its preprocessor_config.json"
        )
    return sizes[0]


def _prepared(processor: Any, image: Image.Image) -> Any:
    try:
        return processor(image, return_tensors="pt")
    except (UserError, MemoryError, ImportError):
        raise
    except Exception as error:
        # Each processor has its own for settings that it does not take.
        raise UserError(
            f"the image processor {type(processor).__name__} cannot prepare an RGB image: {first_line(error)}. Correct "
            f"its configuration, or take a base model and an image processor for RGB images"
        ) from error


def interpolated(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes an 8-bit image [h, w, 3] to [1, 3, *size] by bilinear interpolation with antialiasing."""
    return interpolate(_as_tensor(pixels), size, mode="bilinear", antialias=True)


def _as_tensor(pixels: np.ndarray) -> Tensor:
    """Pixels [h, w, 3] as a batch [1, 3, h, w], not copied."""
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
