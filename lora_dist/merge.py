"""Folds an adapter into its base, and hands the result over only if it classifies as before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from lora_dist import adapters, bundle
from lora_dist.bundle import HALF_PRECISION_TOLERANCE, Classifier, relative_difference, require_same_logits
from lora_dist.errors import UserError
from lora_dist.images import UnreadableImageError, load_rgb
from lora_dist.transforms import ImageTransforms

MOST_IMAGES = 16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PHOTOS = Path(__file__).parent / "demo" / "photos"


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
        UserError: the merged model differs by more, or `out` holds something.
    """
    require_empty(out, "merge_to")
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
    bundle.write_model(out, merged.to(dtype), classifier.processor, _card(source, measured, dtype, len(images)))
    require_same_logits(out, images, after, trust_remote_code=trust_remote_code)
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


def require_empty(out: Path, flag: str) -> None:
    """Refuses a directory that holds something.

    Raises:
        UserError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--{flag} {out} is not empty; name another directory")


def check_images(files: Sequence[str]) -> list[Image.Image]:
    """Images to compare logits on: the first of the user's that can be read, else packaged photographs."""
    return _readable(files) or _readable([str(path) for path in sorted(PHOTOS.glob("*.jpg"))])


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
