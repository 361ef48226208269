"""Compares logits: a written model must give those of the model in memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.model.trained.classifier import load_classifier

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
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """Checks that a written bundle or model gives the expected logits [B, classes] on real images (see peft#577).

    Args:
        expected: logits, on the CPU.
        tolerance: largest difference, relative to the largest logit.
        trust_remote_code: run code that comes with the model.
        prepare: gives the loaded model, in fp32 on the CPU, the device and precision of the expected logits.

    Raises:
        RuntimeError: they differ by more than `tolerance`.
    """
    difference = loaded_difference(directory, images, expected, trust_remote_code, prepare)
    if not difference <= tolerance:
        raise RuntimeError(f"{directory} gives other logits after loading: relative error {difference:.1e}")


def loaded_difference(
    directory: Path,
    images: Sequence[Image.Image],
    expected: Tensor,
    trust_remote_code: bool = False,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> float:
    """Loads a bundle or model, and returns the difference of its logits from the expected ones [B, classes]."""
    loaded = load_classifier(directory, trust_remote_code=trust_remote_code)
    model, pixels = prepare(loaded.model), ImageTransforms(loaded.processor).batch(images)
    with torch.inference_mode(), without_tf32():
        actual = model(pixel_values=pixels.to(next(model.parameters()).device)).logits.float().cpu()
    return relative_difference(actual, expected)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Computes fp32 products in full on CUDA. cuDNN's convolutions use TF32 by default, with errors of up to 2e-2."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value expected."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
