"""Compares the logits of an exported model with those of the classifier that it was made of."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.demo import photographs
from lora_dist.errors import UserError
from lora_dist.model.trained.parity import TOLERANCE, loaded_difference

MAX_IMAGES = 16
"""Images on which logits are compared."""


@torch.inference_mode()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Computes logits [B, classes] of model inputs [B, 3, H, W]."""
    return model(pixel_values=pixels).logits


def require_same_after_loading(
    temporary: Path, out: Path, flag: str, images: Sequence[Image.Image], expected: Tensor, trust_remote_code: bool
) -> None:
    """Checks that a written model, still in a temporary directory, gives the expected logits [B, classes].

    Raises:
        UserError: it does not; the message names `out` and its flag.
    """
    difference = loaded_difference(temporary, images, expected, trust_remote_code)
    if not difference <= TOLERANCE:
        raise UserError(
            f"--{flag} {out}: the written model gave other logits after loading, by {difference:.1e} of the largest, "
            f"and was removed. This is a bug of lora_dist or a library: please report it with their versions"
        )


def check_images(files: Sequence[str], transforms: ImageTransforms) -> list[Image.Image]:
    """Loads the first readable ones of the user's images, else packaged photographs."""
    return list(islice(_readable(files, transforms), MAX_IMAGES)) or list(
        islice(_readable(photographs(), transforms), MAX_IMAGES)
    )


def _readable(files: Sequence[str], transforms: ImageTransforms) -> Iterator[Image.Image]:
    for file in files:
        with suppress(UnreadableImageError):
            yield transforms.load(file)
