"""Draws heat maps of predicted classes over images: files for `--explain`, pictures for the server."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.classify import Row, choose_batch_size
from lora_dist.deployment.inputs import Inputs, NamedImage
from lora_dist.figures import grid, to_images
from lora_dist.model.heat_map import heat_maps
from lora_dist.model.trained.classifier import Classifier
from lora_dist.storage.writable import writing

logger = logging.getLogger(__name__)

SIDE = 256
"""Pixels of the longer side of a picture."""
STRONGEST = 0.7
"""Opacity of the heat map where it is 1."""


def explained(
    rows: Iterable[Row],
    inputs: Inputs,
    indices: Sequence[int],
    classifier: Classifier,
    directory: Path,
    batch_size: int | None,
    device: torch.device,
) -> Iterator[Row]:
    """Yields the rows of `indices` of the inputs. Before each, writes a PNG file: the model's view of the image without
    and with the heat map of its class.

    With several labels per image, the file has the heat map of each label that the image has, or of the label with the
    highest score if it has none.

    Raises:
        UserError: a file cannot be written, or the model has no feature map.
    """
    # Not in the inference mode of `classify`, whose tensors have no gradients.
    classifier.model.to(device)
    transforms = classifier.transforms()
    size = choose_batch_size(batch_size, device, transforms)
    with writing(directory, "explain"):
        directory.mkdir(parents=True, exist_ok=True)
    remaining, places = iter(rows), iter(indices)
    while batch := list(islice(remaining, size)):
        images = inputs.read(list(islice(places, len(batch))))
        _write(batch, images, classifier, transforms, directory, device)
        yield from batch


def _write(
    rows: list[Row],
    images: list[NamedImage],
    classifier: Classifier,
    transforms: ImageTransforms,
    directory: Path,
    device: torch.device,
) -> None:
    readable = []
    for row, image in zip(rows, images, strict=True):
        if row.error is None:
            try:
                readable.append((row, transforms.load(image.source, image.name)))
            except UnreadableImageError as error:
                logger.warning("no explanation of an image that has changed: %s", error)
    if not readable:
        return
    pixels = transforms.finished(transforms.resized([image for _, image in readable]).to(device))
    # Another precision may have given these classes.
    answers = [row.answer or row.top_k[:1] for row, _ in readable]
    drawn = _overlays_of(answers, classifier, pixels)
    for (row, _), answer, picture, maps in zip(readable, answers, to_images(pixels), drawn, strict=True):
        captions = [Path(row.path).name, *(f"{label}\n{score:.1%}" for label, score in answer)]
        with writing(directory, "explain"):
            grid([picture, *maps], captions, columns=len(captions), cell=SIDE).save(file_of(directory, row.path))


def _overlays_of(
    answers: Sequence[Sequence[tuple[str, float]]], classifier: Classifier, pixels: Tensor
) -> list[list[Image.Image]]:
    """Returns the heat map of each label of each image; `answers` has the labels with their scores."""
    drawn: list[list[Image.Image]] = [[] for _ in answers]
    numbers = _class_numbers(answers, classifier, pixels)
    for place in range(max(map(len, answers))):
        chosen = [index for index, answer in enumerate(answers) if len(answer) > place]
        classes = [numbers[index][place] for index in chosen]
        for index, picture in zip(chosen, overlays(classifier.model, pixels[chosen], classes), strict=True):
            drawn[index].append(picture)
    return drawn


def _class_numbers(
    answers: Sequence[Sequence[tuple[str, float]]], classifier: Classifier, pixels: Tensor
) -> list[list[int]]:
    """Returns the class numbers of the labels of each image.

    Of classes with one name, such as the two cranes of ImageNet, the one with the highest logit comes first.
    """
    labels = classifier.labels
    if len(set(labels)) == len(labels):
        return [[labels.index(label) for label, _ in answer] for answer in answers]
    with torch.no_grad():
        ranked: list[list[int]] = classifier.logits(pixels).argsort(descending=True, stable=True).tolist()
    found: list[list[int]] = []
    for answer, left in zip(answers, ranked, strict=True):
        found.append([])
        for label, _ in answer:
            found[-1].append(next(number for number in left if labels[number] == label))
            left.remove(found[-1][-1])
    return found


def file_of(directory: Path, path: str) -> Path:
    """Returns where the explanation of an image is written: its name, with a digest of its path."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return directory / f"{Path(path).stem[:100]}-{digest}.png"


def overlays(model: nn.Module, pixel_values: Tensor, classes: Sequence[int] | None = None) -> list[Image.Image]:
    """Returns images with their heat maps, from yellow to red. Arguments as `heat_maps`."""
    maps = heat_maps(model, pixel_values, classes)
    return [_overlay(image, heat.numpy()) for image, heat in zip(to_images(pixel_values), maps, strict=True)]


def _overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    strength = Image.fromarray((heat * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(strength, dtype=np.float32)[..., None] / 255
    color = np.concatenate([np.full_like(values, 255), 220 * (1 - values), np.zeros_like(values)], axis=-1)
    pixels = np.asarray(image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC))
    opacity = STRONGEST * values
    return Image.fromarray((pixels * (1 - opacity) + color * opacity).round().astype(np.uint8))
