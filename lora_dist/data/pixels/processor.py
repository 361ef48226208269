"""Calls an image processor; each has errors of its own for an image or an option that it does not take."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class ProcessorError(Exception):
    """Raised for an image or option that an image processor does not take, with its message."""


def processed(processor: Any, images: Any, **options: Any) -> "Tensor":
    """Returns the `pixel_values` [B, 3, H, W] of an image processor.

    Raises:
        ProcessorError: the processor ended with an error other than a lack of memory.
    """
    try:
        pixels: Tensor = processor(images, return_tensors="pt", **options)["pixel_values"]
    except MemoryError:
        raise
    except Exception as error:
        raise ProcessorError(str(error)) from error
    return pixels
