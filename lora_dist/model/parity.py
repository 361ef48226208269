"""Whether two ways of computing the same logits agree."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.classifier import load_classifier

TOLERANCE = 1e-3
"""Relative difference of logits up to which two ways of computing them on one device or two count as equal."""
HALF_PRECISION_TOLERANCE = 5e-2
"""The same where one of them is in fp16 or bf16."""


def require_same_logits(
    directory: Path,
    images: Sequence[Image.Image],
    expected: Tensor,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
) -> None:
    """Checks that what was written gives the logits of the model it was written from, on real images.

    Args:
        directory: of the bundle or model.
        images: to classify.
        expected: logits [B, classes] of the model in memory.
        tolerance: largest difference, relative to the largest logit.
        trust_remote_code: run code that comes with the model.

    Raises:
        RuntimeError: it does not; a file that is silently wrong would cost the whole run (peft#577).
    """
    difference = difference_when_read(directory, images, expected, trust_remote_code)
    if not difference <= tolerance:
        raise RuntimeError(f"{directory} was written but gives other logits when read: relative error {difference:.1e}")


def difference_when_read(
    directory: Path, images: Sequence[Image.Image], expected: Tensor, trust_remote_code: bool = False
) -> float:
    """How far a bundle or model, as read, is from logits [B, classes] on images, relative to the largest logit."""
    read = load_classifier(directory, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        actual = read.model(pixel_values=ImageTransforms(read.processor).batch(images)).logits.float()
    return relative_difference(actual, expected)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
