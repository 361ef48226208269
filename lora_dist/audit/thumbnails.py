"""Small pictures for the report."""

import base64
import io

from PIL import Image

from lora_dist.data.pixels.images import load_rgb

SIDE = 192


def thumbnail(path: str) -> str:
    """An image as a `data:` address of at most 192 x 192 pixels; an empty string if it cannot be read."""
    content = io.BytesIO()
    try:
        image = load_rgb(path)
        image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2)
        image.save(content, "JPEG", quality=80)
    except Exception:
        # Whatever it is: the picture is left out, and the findings are what the report is for.
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
