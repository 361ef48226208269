"""Builds a base model with the stochastic depth of `--drop_path`, without changing the rate in its configuration."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn

from lora_dist.errors import UserError
from lora_dist.model.base.timm_image_size import MODEL_TYPE

RATE = "drop_path_rate"
"""The name of the rate in the configurations of transformers and in the arguments of timm's models."""


def with_rate(config: Any, rate: float) -> Any:
    """Changes the rate in a configuration from which a model is built, and returns the previous value.

    Raises:
        UserError: the architecture has no stochastic depth.
    """
    if config.model_type == MODEL_TYPE:
        before, config.model_args = config.model_args, {**(config.model_args or {}), RATE: rate}
        return before
    own = _own(config)
    before = getattr(own, RATE, None)
    if not isinstance(before, int | float):
        why = "it has a rate for each stage" if before is not None else f"its configuration has no {RATE}"
        raise UserError(f"--drop_path: a {own.model_type} model has no stochastic depth that can be set: {why}")
    try:
        setattr(own, RATE, rate)
    except StrictDataclassError as error:
        raise UserError(f"--drop_path: the {RATE} of a {own.model_type} model is a whole number") from error
    return before


def restore_rate(model: Any, before: Any, rate: float) -> None:
    """Restores the rate in the configuration of a model that was built with another one.

    Raises:
        UserError: the model was built without stochastic depth.
    """
    if rate > 0 and not any(_drops(module) for module in model.modules()):
        raise UserError(f"--drop_path: {type(model).__name__} has no stochastic depth, whatever its configuration says")
    if model.config.model_type == MODEL_TYPE:
        # The arguments may have got another image size since.
        others = {name: value for name, value in model.config.model_args.items() if name != RATE}
        model.config.model_args = others | ({RATE: before[RATE]} if before and RATE in before else {}) or before
    else:
        setattr(_own(model.config), RATE, before)


def _drops(module: nn.Module) -> bool:
    return type(module).__name__.endswith("DropPath") and (getattr(module, "drop_prob", 0) or 0) > 0


def _own(config: Any) -> Any:
    """The configuration of the backbone, which is inside that of a pooled backbone."""
    return getattr(config, "backbone_config", None) or config
