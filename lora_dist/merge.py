"""Folds an adapter into its base, and hands the result over only if it classifies as before."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from lora_dist import adapters, bundle
from lora_dist.bundle import Classifier, relative_difference, require_same_logits
from lora_dist.errors import UserError
from lora_dist.images import UnreadableImageError, load_rgb
from lora_dist.transforms import ImageTransforms

MOST_IMAGES = 16
PHOTOS = Path(__file__).parent / "demo" / "photos"


def merge_to(classifier: Classifier, source: Path, out: Path, files: Sequence[str], tolerance: float) -> float:
    """Writes the merged model as a plain `transformers` checkpoint with its processor and label map.

    Args:
        classifier: with an adapter; used up.
        source: directory of the adapter, for the card.
        out: must not exist, or be empty.
        files: images to compare logits on; the first that can be read are taken, else packaged photographs.
        tolerance: largest difference of logits, relative to the largest logit.

    Returns:
        The difference measured.

    Raises:
        UserError: the merged model differs by more, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--merge_to {out} is not empty; name another directory")
    images = _readable(files) or _readable([str(path) for path in sorted(PHOTOS.glob("*.jpg"))])
    pixels = ImageTransforms(classifier.processor).batch(images)
    with torch.inference_mode():
        before = classifier.model(pixel_values=pixels).logits
    merged = adapters.merge(classifier.model).eval()
    with torch.inference_mode():
        after = merged(pixel_values=pixels).logits
    difference = relative_difference(after, before)
    if not difference <= tolerance:
        raise UserError(
            f"the merged model differs from the adapter by {difference:.1e}, more than --merge_tolerance "
            f"{tolerance:.1e}; nothing was written"
        )
    card = (
        f"# {source.resolve().parent.name}, merged\n\n"
        f"The adapter `{source}` merged into its base in fp32 by lora_dist. On {len(images)} images its logits differ "
        f"from the adapter's by {difference:.1e}, relative to the largest.\n\n"
        f'    pipeline("image-classification", model="THIS_DIRECTORY")\n'
    )
    bundle.write_model(out, merged, classifier.processor, card)
    require_same_logits(out, images, after)
    return difference


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
