"""Small pictures for the report."""

import base64
import io

from PIL import Image

from lora_dist.images import UnreadableImageError, load_rgb

SIDE = 192


def thumbnail(path: str) -> str:
    """An image as a `data:` address of at most 192 x 192 pixels; an empty string if it cannot be read."""
    try:
        image = load_rgb(path)
    except UnreadableImageError:
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
