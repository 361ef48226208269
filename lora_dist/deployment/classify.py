"""Classifies images: the predictions of a model, in batches, in the order of the images."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.inputs import Files, Inputs
from lora_dist.errors import UserError, first_line
from lora_dist.metrics.predictions import UNKNOWN
from lora_dist.model.features import PooledFeatures
from lora_dist.model.trained.classifier import Classifier
from lora_dist.processes.cores import cores_per_process
from lora_dist.processes.devices import computes_on_cpu, inference_batch_size
from lora_dist.processes.workers import (
    POLL_SECONDS,
    SHARED_MEMORY,
    SILENT_SECONDS,
    from_workers,
    worker_loader,
)
from lora_dist.settings.predict import OutputType
from lora_dist.storage.disk import free_bytes

TINY_FILE = 8_000
"""Bytes of a file below which a decoding process costs more than it saves."""
MIN_DECODED = 32
"""Images, at least, that a decoding process returns at once, because each return has a fixed cost."""
MAX_WORKERS = 16
"""Decoding processes, at most, where `--num_workers` is not set."""
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Inference:
    """Options of a pass of a model over images.

    Attributes:
        device: where the model runs.
        batch_size: images per forward pass; None as in `choose_batch_size`.
        num_workers: decoding processes; None for a number that suits the device, which is 0 for few or tiny files.
        precision: of autocast; fp32 for no autocast.
    """

    device: torch.device
    batch_size: int | None = None
    num_workers: int | None = None
    precision: Precision = "fp32"


class Row(NamedTuple):
    """The prediction for one image.

    Attributes:
        top_k: classes with their probabilities, most likely first; empty if there is an error.
        error: why the image is unreadable, or None.
        adapter: name of the adapter, if there are several.
        is_known: whether the prediction is confident enough.
        values: float32 [classes] or [features], if probabilities, logits or embeddings were asked for.
        labels: for several labels per image, those above their thresholds with their scores, highest first; None for
            one class per image.
    """

    path: str
    top_k: list[tuple[str, float]]
    error: str | None = None
    adapter: str | None = None
    is_known: bool = True
    values: np.ndarray | None = None
    labels: list[tuple[str, float]] | None = None

    @property
    def answer(self) -> list[tuple[str, float]]:
        """The labels of a readable image, or its most likely class, with scores."""
        return self.top_k[:1] if self.labels is None else self.labels

    @property
    def label(self) -> str:
        """The most likely class, or `UNKNOWN`."""
        return self.top_k[0][0] if self.is_known else UNKNOWN

    def known_from(self, min_confidence: float | None) -> "Row":
        """Returns this row with `is_known`: whether its highest probability is at least `min_confidence`."""
        if min_confidence is None or not self.top_k:
            return self
        return self._replace(is_known=self.top_k[0][1] >= min_confidence)


def choose_device(name: str) -> torch.device:
    """Returns the device; `auto` selects an accelerator if there is one, each process of a launch its own.

    Raises:
        UserError: the machine has no such device.
    """
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            if found is None or computes_on_cpu():
                return torch.device("cpu")
            if "LOCAL_RANK" not in os.environ:
                return found
            return torch.device(found.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not on this machine ({first_line(error)})") from error
    return device


def choose_batch_size(given: int | None, device: torch.device, transforms: ImageTransforms) -> int:
    """Returns the given batch size, or the default for the device and the size of the images."""
    return given or inference_batch_size(device, transforms.height, transforms.width)


def choose_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Returns the precision; `auto` is bf16 on a CUDA device that computes in it, and fp32 elsewhere."""
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


@torch.inference_mode()
def classify(
    classifier: Classifier,
    images: Sequence[str] | Inputs,
    inference: Inference,
    *,
    top_k: int,
    indices: Sequence[int] | None = None,
    output_type: OutputType = "top_k",
) -> Iterator[Row]:
    """Yields a row with `top_k` classes for each image, in order; that of an unreadable image has an error.

    Args:
        classifier: moved to the device of `inference`.
        images: paths, or other inputs.
        inference: how the model runs.
        top_k: number of classes in a row.
        indices: of the images to classify. Default: all.
        output_type: kind of the `values` of the rows.

    Raises:
        UserError: a logit is not finite, or a data set cannot be read.
    """
    device = inference.device
    classifier.model.to(device)
    inputs = Files(images) if isinstance(images, Sequence) else images
    chosen = range(len(inputs)) if indices is None else indices
    transforms = classifier.transforms()
    batch_size = choose_batch_size(inference.batch_size, device, transforms)
    loader = _decoding_loader(inputs, chosen, transforms, max(batch_size, MIN_DECODED), inference)
    with ExitStack() as stack:
        features = stack.enter_context(PooledFeatures(classifier.model)) if output_type == "embeddings" else None
        predict = partial(_predict, classifier, features, top_k, output_type, inference.precision)
        for decoded in from_workers(loader, SILENT_SECONDS):
            if isinstance(decoded, UserError):
                raise decoded
            batches = () if decoded.pixels is None else decoded.pixels.split(batch_size)
            finished = (transforms.finished(batch.to(device, non_blocking=True)) for batch in batches)
            # Lazy, so that rows of a batch are written before the next batch runs.
            predictions = (prediction for batch in finished for prediction in predict(batch))
            for name, error in zip(decoded.names, decoded.errors, strict=True):
                best, labels, values = ([], None, None) if error else next(predictions)
                yield Row(name, best, error, values=values, labels=labels)


def _decoding_loader(
    inputs: Inputs, indices: Sequence[int], transforms: ImageTransforms, size: int, inference: Inference
) -> DataLoader:
    """Returns a loader that decodes `size` images at once."""
    if inference.num_workers is not None:
        workers = inference.num_workers
    elif len(indices) <= size or not _are_slow_to_decode(inputs, indices[:size]):
        workers = 0
    else:
        workers = choose_workers(inference.device, size * 3 * transforms.height * transforms.width)
    return worker_loader(
        _Decoder(inputs, transforms),
        batch_sampler=BatchSampler(indices, size, drop_last=False),
        workers=workers,
        pin_memory=inference.device.type == "cuda",
        timeout=POLL_SECONDS,
    )


def choose_workers(device: torch.device, batch_bytes: int) -> int:
    """Returns the number of decoding processes: one beside a CPU that computes, otherwise this process's cores.

    Args:
        device: where the model runs.
        batch_bytes: bytes of a batch of 8-bit pixels. Each process keeps up to three in shared memory, of which
            half is left free.
    """
    if device.type == "cpu":
        return 1
    fitting = free_bytes(SHARED_MEMORY) // (6 * batch_bytes) if SHARED_MEMORY.is_dir() else MAX_WORKERS
    return max(1, min(cores_per_process() - 1, fitting, MAX_WORKERS))


def _predict(
    classifier: Classifier,
    features: PooledFeatures | None,
    top_k: int,
    output_type: OutputType,
    precision: Precision,
    pixel_values: Tensor,
) -> Iterator[tuple[list[tuple[str, float]], list[tuple[str, float]] | None, np.ndarray | None]]:
    """Yields `top_k`, `labels` and `values` of the row of each image of a batch."""
    kind, dtype = pixel_values.device.type, None if precision == "fp32" else DTYPES[precision]
    with torch.autocast(kind, dtype, enabled=dtype is not None):
        logits = classifier.logits(pixel_values)
    probabilities = classifier.decision.scores(logits)
    best, labels = classifier.top_k(probabilities, top_k), classifier.chosen(probabilities)
    if output_type == "top_k":
        yield from ((*classes, None) for classes in zip(best, labels, strict=True))
        return
    if output_type == "embeddings":
        assert features is not None
        values = features.last()
    else:
        values = logits if output_type == "logits" else probabilities
    yield from zip(best, labels, values.cpu().numpy(), strict=True)


def _are_slow_to_decode(inputs: Inputs, indices: Sequence[int]) -> bool:
    """Whether a decoding process is worth its cost. It always is for a data set, whose rows have to be read as well."""
    if not isinstance(inputs, Files):
        return True
    files = [Path(image.name) for image in inputs.read(indices)]
    return sum(file.stat().st_size for file in files if file.is_file()) > TINY_FILE * len(files)


class _DecodedBatch(NamedTuple):
    """Names and errors of images, and the pixels [B, 3, H, W] of the readable ones."""

    names: list[str]
    errors: list[str | None]
    pixels: Tensor | None


class _Decoder(Dataset):
    """Decodes images by their indices, in this process or another."""

    def __init__(self, inputs: Inputs, transforms: ImageTransforms) -> None:
        self.inputs = inputs
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: Sequence[int]) -> _DecodedBatch | UserError:
        try:
            found = self.inputs.read(indices)
        except UserError as error:
            return error
        errors: list[str | None] = []
        images = []
        for source, name in found:
            try:
                images.append(self.transforms.load(source, name))
                errors.append(None)
            except UnreadableImageError as error:
                errors.append(str(error))
        return _DecodedBatch(
            [image.name for image in found], errors, self.transforms.resized(images) if images else None
        )
