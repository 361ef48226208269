"""Checks that a model takes the output of its image processor, and returns logits."""

from typing import Any

import torch
from PIL import Image

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError


@torch.no_grad()
def require_fit(model: Any, processor: Any) -> None:
    """Classifies one black image.

    Raises:
        UserError: the processor does not make images of one size, or the model does not take them as they are, or
            returns no logits of its classes.
    """
    transforms = ImageTransforms(processor)
    size, kind = f"{transforms.height} x {transforms.width}", type(model).__name__
    pixels = transforms.evaluation(Image.new("RGB", (transforms.width, transforms.height)))[None]
    was_training = model.training
    model.eval()
    try:
        logits = getattr(model(pixel_values=pixels), "logits", None)
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{kind} takes {_expected(model.config)}, and its image processor gives 3 x {size}: {reason}. Change size "
            f"or crop_size in preprocessor_config.json, or take another base model"
        ) from error
    finally:
        model.train(was_training)
    if logits is None:
        raise UserError(f"{kind} returns no logits and cannot be trained as a classifier")
    if list(logits.shape) != [1, model.config.num_labels]:
        raise UserError(
            f"{kind} returns logits of shape {list(logits.shape)} for one image, not [1, {model.config.num_labels}]"
        )


def _expected(config: Any) -> str:
    """The input that a configuration names, such as `3 x 224 x 224`."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    numbers = [getattr(vision, "num_channels", 3), *(side or "any" for side in sides)]
    return " x ".join(map(str, numbers))
