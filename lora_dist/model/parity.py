"""Compares logits: a written model must give those of the model in memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.classifier import load_classifier

TOLERANCE = 1e-3
"""Largest difference of fp32 logits, relative to the largest logit, on the same or another device."""
HALF_PRECISION_TOLERANCE = 5e-2
"""The same if one side is computed in fp16 or bf16."""


def require_same_logits(
    directory: Path,
    images: Sequence[Image.Image],
    expected: Tensor,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
) -> None:
    """Checks that a written bundle or model gives the expected logits [B, classes] on real images (see peft#577).

    Raises:
        RuntimeError: they differ by more than `tolerance`, relative to the largest logit.
    """
    difference = loaded_difference(directory, images, expected, trust_remote_code)
    if not difference <= tolerance:
        raise RuntimeError(f"{directory} gives other logits after loading: relative error {difference:.1e}")


def loaded_difference(
    directory: Path, images: Sequence[Image.Image], expected: Tensor, trust_remote_code: bool = False
) -> float:
    """Loads a bundle or model, and returns the difference of its logits from the expected ones [B, classes]."""
    loaded = load_classifier(directory, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        actual = loaded.model(pixel_values=ImageTransforms(loaded.processor).batch(images)).logits.float()
    return relative_difference(actual, expected)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value expected."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
