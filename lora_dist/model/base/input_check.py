"""Checks that a model takes the output of its image processor, and returns logits."""

from typing import Any

import torch
from PIL import Image

from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError, first_line


@torch.no_grad()
def require_fit(model: Any, processor: Any) -> None:
    """Classifies two black images.

    Raises:
        UserError: the processor does not make images of one size, or the model does not take them as they are, or
            returns no logits of its classes.
    """
    transforms = ImageTransforms(processor)
    size, kind = f"{transforms.height} x {transforms.width}", type(model).__name__
    pixels = transforms.evaluation(Image.new("RGB", (transforms.width, transforms.height))).expand(2, -1, -1, -1)
    if not pixels.isfinite().all():
        raise UserError(
            f"the image processor {type(processor).__name__} makes values of an image that are not finite: correct "
            f"image_mean and image_std in its configuration"
        )
    was_training = model.training
    model.eval()
    try:
        logits = getattr(model(pixel_values=pixels), "logits", None)
    except MemoryError:
        raise
    except Exception as error:
        advice = "Change size or crop_size in preprocessor_config.json, or take another base model"
        if _channels(model.config) != 3:
            advice = "Take a base model for RGB images"
        elif isinstance(error, TypeError):
            advice = "Take a base model whose forward pass takes pixel_values alone"
        raise UserError(
            f"{kind} takes {_expected(model.config)}, and its image processor gives 3 x {size}: "
            f"{first_line(error)}. {advice}"
        ) from error
    finally:
        model.train(was_training)
    if logits is None:
        raise UserError(f"{kind} returns no logits and cannot be trained as a classifier")
    if not isinstance(logits, torch.Tensor):
        raise UserError(
            f"{kind} returns {len(logits)} outputs in place of logits: turn its auxiliary head off, such as aux_logits "
            f"in the model_args of timm's config.json"
        )
    expected = [2, model.config.num_labels]
    if list(logits.shape) != expected:
        advice = "that classifies each image by itself, and whose head pools its features (global_pool of timm)"
        if logits.dim() == 2 and len(logits) == 2:
            advice = "whose head follows num_labels of its configuration"
        raise UserError(
            f"{kind} returns logits of shape {list(logits.shape)} for two images, not {expected}: take a base model "
            f"{advice}"
        )
    if not logits.isfinite().all():
        raise UserError(f"{kind} gives logits that are not finite for a black image: its weights are probably damaged")


def _expected(config: Any) -> str:
    """The input that a configuration names, such as `3 x 224 x 224`."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    return " x ".join(map(str, [_channels(config), *(side or "any" for side in sides)]))


def _channels(config: Any) -> int:
    """Channels of the images that a model of transformers or timm takes."""
    of_timm: dict[str, int] = getattr(config, "model_args", None) or {}
    vision: Any = getattr(config, "vision_config", config)
    channels: int = getattr(vision, "num_channels", 3)
    return of_timm.get("in_chans", channels)
