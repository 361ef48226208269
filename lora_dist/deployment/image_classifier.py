"""From Python: loads anything that `predict` takes, and classifies paths, Pillow images and arrays."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_dist import demo, hub
from lora_dist.deployment.classify import MIN_DECODED, choose_batch_size, choose_device
from lora_dist.deployment.export.onnx_model import load_onnx
from lora_dist.errors import UserError
from lora_dist.logs import quiet_transformers
from lora_dist.model.trained import checkpoint_adapter
from lora_dist.model.trained.classifier import Classifier, load_classifier

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
"""Path of an image file, a Pillow image, or an array of `ARRAYS`."""
DEFAULT_TOP_K = 5
"""Classes per image, of one class each, as in a pipeline of transformers."""
ARRAYS = "uint8 [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA), or uint16 [H, W]"


class Score(TypedDict):
    """A class or label and its probability, as a pipeline of transformers returns them."""

    label: str
    score: float


class ImageClassifier:
    """A model that classifies images as `predict --precision fp32` does: same preprocessing, same probabilities.

    Attributes:
        labels: class names in order.
        thresholds: of each label, by name: an image has the labels whose scores reach them. None for a model of one
            class per image.
        device: where the model is.
    """

    labels: list[str]
    thresholds: dict[str, float] | None
    device: torch.device

    def __init__(self, classifier: Classifier, device: torch.device) -> None:
        """
        Args:
            classifier: as loaded.
            device: the model is moved there.
        """
        self.labels = classifier.labels
        self.thresholds = classifier.decision.record(classifier.labels)
        self.device = device
        classifier.model.to(device)
        self._classifier = classifier
        self._transforms = classifier.transforms()

    # A str is a sequence of str as well; the first overload that fits counts.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, images: ImageLike, *, top_k: int | None = None, batch_size: int | None = None
    ) -> list[Score]: ...

    @overload
    def __call__(
        self, images: Sequence[ImageLike], *, top_k: int | None = None, batch_size: int | None = None
    ) -> list[list[Score]]: ...

    @torch.inference_mode()
    def __call__(
        self, images: ImageLike | Sequence[ImageLike], *, top_k: int | None = None, batch_size: int | None = None
    ) -> list[Score] | list[list[Score]]:
        """Classifies one image, or a list of images.

        Args:
            images: paths of files, Pillow images, or arrays: uint8 [H, W], [H, W, 3] or [H, W, 4], or uint16 [H, W].
            top_k: number of classes per image. By default the 5 most likely classes; with several labels per image, all
                labels whose scores reach their thresholds, possibly none.
            batch_size: images per forward pass; by default as many as in `predict`.

        Returns:
            The classes or labels with the highest scores first; for a list of images a list of these.

        Raises:
            UnreadableImageError: a file cannot be decoded.
            UserError: an array is no image, `top_k` is not positive, or a logit is not finite.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}, but must be positive")
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            return self._scores([images], top_k, 1)[0]
        return self._scores(images, top_k, choose_batch_size(batch_size, self.device, self._transforms))

    def _scores(self, images: Sequence[ImageLike], top_k: int | None, batch_size: int) -> list[list[Score]]:
        scores: list[list[Score]] = []
        at_once = max(batch_size, MIN_DECODED)
        for start in range(0, len(images), at_once):
            decoded = (self._transforms.load(_source(image)) for image in images[start : start + at_once])
            for pixels in self._transforms.resized(decoded).split(batch_size):
                probabilities = self._classifier.probabilities(self._transforms.finished(pixels.to(self.device)))
                for row in self._answers(probabilities, top_k):
                    scores.append([Score(label=label, score=score) for label, score in row])
        return scores

    def _answers(self, probabilities: Tensor, top_k: int | None) -> list[list[tuple[str, float]]]:
        likely = self._classifier.top_k(probabilities, top_k or DEFAULT_TOP_K)
        if top_k is not None:
            return likely
        chosen = self._classifier.chosen(probabilities)
        return [best if labels is None else labels for best, labels in zip(likely, chosen, strict=True)]


def load(
    path: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    labels: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
) -> ImageClassifier:
    """Loads an adapter, a checkpoint of a finished run, a merged or full model, or an ONNX file.

    Args:
        path: directory of an adapter, checkpoint or model, its name on the Hub (`org/name` or `org/name@revision`), or
            an ONNX file that `predict` wrote.
        base_model: location of an adapter's base, if it has moved since training.
        labels: class names of an adapter that has no label map.
        trust_remote_code: run code that comes with the model. Use only with sources that you trust.
        device: auto, cpu, cuda, cuda:1, mps, … An ONNX file runs on the CPU.

    Raises:
        UserError: there is nothing that can be loaded, or it is damaged, or the adapter was trained on another base.
    """
    name = demo.local_path(os.fspath(path))
    if Path(name).suffix == ".onnx" or Path(name).is_file():
        if base_model or labels:
            raise UserError(f"{name}: an ONNX file has no base, and its own labels: leave base_model and labels out")
        if device not in ("auto", "cpu"):
            raise UserError(f"{name}: ONNX files run on the CPU: leave device out")
        return ImageClassifier(load_onnx(Path(name)), choose_device("cpu"))
    directory = hub.local_directory(name)
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="lora_dist-") as made:
        if checkpoint_adapter.is_checkpoint(directory):
            checkpoint, directory = directory, Path(made) / directory.name
            checkpoint_adapter.write_adapter_of_checkpoint(checkpoint, directory)
        classifier = load_classifier(directory, base_model, trust_remote_code, labels)
    return ImageClassifier(classifier, choose_device(device))


def _source(image: ImageLike) -> str | Image.Image:
    """An image as `ImageTransforms.load` takes it."""
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        return os.fspath(image)
    is_color = image.ndim == 3 and image.shape[2] in (3, 4) and image.dtype == np.uint8
    if not is_color and not (image.ndim == 2 and image.dtype in (np.uint8, np.uint16)):
        raise UserError(f"an array of {image.dtype} {list(image.shape)} is no image: expected {ARRAYS}")
    return Image.fromarray(image)
