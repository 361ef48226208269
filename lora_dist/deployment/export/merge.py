"""Folds an adapter into its base, and hands the result over only if it classifies as before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from lora_dist.data.pixels.images import UnreadableImageError, load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.demo import photographs
from lora_dist.deployment.export.destinations import require_free_directory
from lora_dist.errors import UserError
from lora_dist.model import adapters, bundle
from lora_dist.model.classifier import Classifier
from lora_dist.model.parity import HALF_PRECISION_TOLERANCE, TOLERANCE, difference_when_read, relative_difference
from lora_dist.storage.files import whole_directory

MOST_IMAGES = 16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Merged(NamedTuple):
    """How far the logits of a merged model are from those of its adapter, relative to the largest.

    Attributes:
        merge: in fp32.
        rounding: of weights rounded to half precision, in fp32 arithmetic; None where they stay fp32.
    """

    merge: float
    rounding: float | None = None


def merge_to(
    classifier: Classifier,
    source: str,
    out: Path,
    files: Sequence[str],
    tolerance: float,
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    trust_remote_code: bool = False,
) -> Merged:
    """Writes the merged model as a plain `transformers` checkpoint with its processor and label map.

    Args:
        classifier: with an adapter; used up.
        source: the adapter in words, for the card.
        out: must not exist, or be empty.
        files: images to compare logits on; the first that can be read are taken, else packaged photographs.
        tolerance: largest difference of logits, relative to the largest logit. What half precision rounds away may
            be `HALF_PRECISION_TOLERANCE`.
        precision: to round the merged weights to, last.
        trust_remote_code: run code that comes with the base.

    Returns:
        The differences measured.

    Raises:
        UserError: the merged model differs by more, in memory or as read, or `out` holds something or cannot be made.
    """
    require_free_directory(out, "merge_to")
    dtype = DTYPES[precision]
    images = check_images(files)
    pixels = ImageTransforms(classifier.processor).batch(images)
    before = logits(classifier.model, pixels)
    merged: Any = adapters.merge(classifier.model).eval()
    after = logits(merged, pixels)
    measured = Merged(relative_difference(after, before))
    if not measured.merge <= tolerance:
        raise UserError(
            f"the merged model differs from the adapter by {measured.merge:.1e}, more than --merge_tolerance "
            f"{tolerance:.1e}; nothing was written"
        )
    if dtype != torch.float32:
        after = logits(_round(merged, dtype), pixels)
        rounding = relative_difference(after, before)
        measured = measured._replace(rounding=rounding)
        if not rounding <= max(tolerance, HALF_PRECISION_TOLERANCE):
            raise UserError(
                f"in {precision} the merged model differs from the adapter by {rounding:.1e}, more than "
                f"{max(tolerance, HALF_PRECISION_TOLERANCE):.1e}; nothing was written. Leave --dtype out, or take the "
                f"other one"
            )
    with whole_directory(out) as aside:
        card = _card(source, measured, dtype, len(images))
        bundle.write_model_files(aside, merged.to(dtype), classifier.processor, card)
        require_read_back(aside, out, "merge_to", images, after, trust_remote_code)
    return measured


@torch.inference_mode()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits [B, classes] of pixels [B, 3, H, W]."""
    return model(pixel_values=pixels).logits


def _round(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Rounds what a checkpoint of this dtype would hold, in place; the tensors stay fp32."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return model


def _card(source: str, measured: Merged, dtype: torch.dtype, images: int) -> str:
    lines = [
        f"# {source}, merged",
        "",
        f"Merged into the base in fp32 by lora_dist. On {images} images the logits of the merged model differ from the "
        f"adapter's by {measured.merge:.1e}, relative to the largest.",
    ]
    if measured.rounding is not None:
        lines.append(
            f"The weights were rounded to {str(dtype).removeprefix('torch.')} last; computed in fp32 from these, the "
            f"logits differ by {measured.rounding:.1e}."
        )
    return "\n".join([*lines, "", '    pipeline("image-classification", model="THIS_DIRECTORY")', ""])


def require_read_back(
    aside: Path, out: Path, flag: str, images: Sequence[Image.Image], expected: Tensor, trust_remote_code: bool
) -> None:
    """Checks that what was written, and is not yet in its place, gives the logits that it should.

    Args:
        aside: directory where it is now.
        out: where it is to be.
        flag: that names `out`.
        images: to classify.
        expected: logits [B, classes] of the model in memory.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: it does not.
    """
    difference = difference_when_read(aside, images, expected, trust_remote_code)
    if not difference <= TOLERANCE:
        raise UserError(
            f"--{flag} {out}: what was written gave other logits when it was read, by {difference:.1e} of the largest, "
            f"and was removed. This is a mistake of lora_dist or a library: please report it with their versions"
        )


def check_images(files: Sequence[str]) -> list[Image.Image]:
    """Images to compare logits on: the first of the user's that can be read, else packaged photographs."""
    return _readable(files) or _readable(photographs())


def _readable(files: Sequence[str]) -> list[Image.Image]:
    images: list[Image.Image] = []
    for file in files:
        if len(images) == MOST_IMAGES:
            break
        try:
            images.append(load_rgb(file))
        except UnreadableImageError:
            continue
    return images
