"""Gives a timm model in transformers' wrapper, and its image processor, another input size."""

import copy
from typing import Any

import torch

Size = tuple[int, int]
MODEL_TYPE = "timm_wrapper"


def rebuilt(model: Any, size: Size) -> Any:
    """Returns the model as timm builds it for height and width `size`; timm interpolates its position embeddings.

    Raises:
        Exception: of any class; each model has its own for a size that it does not take.
    """
    import timm

    config = copy.deepcopy(model.config)
    config.model_args = {**(config.model_args or {}), "img_size": list(size)}
    weights = {"state_dict": model.timm_model.state_dict(), "num_classes": config.num_labels}
    resized = timm.create_model(
        config.architecture,
        pretrained=True,
        pretrained_cfg_overlay=weights,
        num_classes=config.num_labels,
        **config.model_args,
    )
    state = {f"timm_model.{name}": tensor for name, tensor in resized.state_dict().items()}
    wrapped = type(model).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    wrapped.name_or_path = wrapped.config.name_or_path = model.config.name_or_path
    wrapped.config._commit_hash = getattr(model.config, "_commit_hash", None)
    return wrapped


def record_size(config: Any, size: Size) -> None:
    """Changes the input size in a model's configuration, from which a saved model's image processor is built."""
    config.pretrained_cfg = {**config.pretrained_cfg, "input_size": [3, *size]}


def resized_processor(processor: Any, size: Size) -> Any:
    """Returns timm's evaluation transforms for height and width `size`, with the same share around a center crop."""
    return type(processor)({**processor.data_config, "input_size": [3, *size]}, processor.architecture)
