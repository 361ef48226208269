"""Chooses the classifier of a checkpoint: its own class, or a head on pooled features if it has none."""

from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    ViTConfig,
    ViTMAEConfig,
)

from lora_dist.errors import first_line
from lora_dist.model.base.pooled_backbone import (
    PooledBackboneConfig,
    PooledBackboneForImageClassification,
    make_backbone,
    pooled,
)
from lora_dist.model.base.without_data import outputs_without_data

AUTO_MAP = {
    auto_class: f"{PooledBackboneConfig.__module__.rpartition('.')[2]}.{own.__name__}"
    for auto_class, own in (
        ("AutoConfig", PooledBackboneConfig),
        ("AutoModelForImageClassification", PooledBackboneForImageClassification),
    )
}
"""The `auto_map` by which `transformers` finds the classes in the file that `save_pretrained` writes."""
_PREFIX_TOKENS = {"dinov3_convnext": 1}
"""Tokens before the patches, for models without a patch size."""

AutoConfig.register(PooledBackboneConfig.model_type, PooledBackboneConfig)
AutoModelForImageClassification.register(PooledBackboneConfig, PooledBackboneForImageClassification)
PooledBackboneConfig.register_for_auto_class()
PooledBackboneForImageClassification.register_for_auto_class("AutoModelForImageClassification")


def classifier_config(config: Any, pooling: str | None, size: tuple[int, int]) -> Any:
    """Returns the configuration of the image classifier to load for a checkpoint.

    Args:
        config: of the checkpoint.
        pooling: features for a linear layer (see `PooledBackboneConfig`); None for the checkpoint's own class, or its
            pooler, or else the mean of its patches.
        size: height and width of the images.

    Raises:
        ValueError: the checkpoint has no backbone for images, or it has no such features.
    """
    if isinstance(config, ViTMAEConfig):
        # `AutoModel` would mask most of the patches.
        return classifier_config(_as_vit(config), pooling, size)
    if isinstance(config, PooledBackboneConfig):
        if pooling not in (None, config.pooling):
            raise ValueError(f"it pools features by {config.pooling!r}, not {pooling!r}; leave --pooling out")
        return config
    remote = getattr(config, "auto_map", None) or {}
    own_class = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or "AutoModelForImageClassification" in remote
    return config if own_class and pooling is None else _pooled_config(config, pooling, size)


def prefixes_to_remove(config: Any) -> dict[str, str] | None:
    """Returns the `key_mapping` with which a pooled backbone loads a checkpoint of a model around the backbone."""
    if not isinstance(config, PooledBackboneConfig):
        return None
    with torch.device("meta"):
        backbone = make_backbone(config.backbone_config)
    # GroupViT and others have a module of such a name inside the backbone.
    prefixes = [name for name in ("vision_model", backbone.base_model_prefix) if name and not hasattr(backbone, name)]
    return {rf"^(?:{'|'.join(prefixes)})\.": ""} if prefixes else None


def _as_vit(config: ViTMAEConfig) -> ViTConfig:
    known = ViTConfig().to_dict()
    found = ViTConfig(**{name: value for name, value in config.to_dict().items() if name in known})
    found.architectures = ["ViTForImageClassification"]
    return _with_commit(found, config)


def _pooled_config(config: Any, pooling: str | None, size: tuple[int, int]) -> PooledBackboneConfig:
    backbone = getattr(config, "vision_config", config)
    if type(backbone).__module__.startswith("transformers_modules."):
        raise ValueError(
            "its code has no image classifier (AutoModelForImageClassification in auto_map): add one, or do not run "
            "the code if transformers has a model of its own for the checkpoint"
        )
    if backbone.model_type == "timm_wrapper":
        raise ValueError("a timm model has a head on pooled features of its own; leave --pooling out")
    outputs = _output_shapes(backbone, size)
    own = any(outputs.get(name) is not None for name in ("pooler_output", "summary"))
    tokens = outputs.get("last_hidden_state")
    pooling = pooling or ("pooler" if own else "mean")
    prefix_tokens = 0 if tokens is None else _prefix_tokens(backbone, tokens, size)
    if pooling == "pooler" and not own:
        raise ValueError(f"a {backbone.model_type} model has no pooler; use --pooling class_token or mean")
    if pooling != "pooler" and tokens is None:
        raise ValueError(f"a {backbone.model_type} model returns no last_hidden_state; use --pooling pooler")
    if pooling == "class_token" and (not prefix_tokens or backbone.model_type in _PREFIX_TOKENS):
        raise ValueError(f"a {backbone.model_type} model has no class token; use another --pooling")
    # A directory of this machine says nothing elsewhere.
    backbone.name_or_path = ""
    made = PooledBackboneConfig(
        backbone_config=backbone,
        pooling=pooling,
        prefix_tokens=prefix_tokens,
        feature_size=pooled(outputs, pooling, prefix_tokens).shape[1],
    )
    made.auto_map = dict(AUTO_MAP)
    made.architectures = [PooledBackboneForImageClassification.__name__]
    return _with_commit(made, config)


def _output_shapes(config: Any, size: tuple[int, int]) -> Any:
    """The outputs of a backbone for one image, without data."""
    why = f"transformers has no image classifier of type {config.model_type}, "
    try:
        outputs = outputs_without_data(make_backbone, config, size)
    except ImportError:
        raise
    except Exception as error:
        # Each model has its own exception for inputs that it does not take.
        reason = first_line(error)
        raise ValueError(f"{why}and its backbone cannot be used with images alone ({reason})") from error
    if all(outputs.get(name) is None for name in ("pooler_output", "summary", "last_hidden_state")):
        raise ValueError(f"{why}and its backbone returns no features (it returns {', '.join(outputs)})")
    return outputs


def _prefix_tokens(config: Any, tokens: torch.Tensor, size: tuple[int, int]) -> int:
    """Returns the number of tokens before those of the patches."""
    patch = getattr(config, "patch_size", None)
    if patch is None or tokens.dim() != 3:
        return _PREFIX_TOKENS.get(config.model_type, 0)
    height, width = patch if isinstance(patch, list | tuple) else (patch, patch)
    return max(0, tokens.shape[1] - (size[0] // height) * (size[1] // width))


def _with_commit(made: Any, config: Any) -> Any:
    made._commit_hash = getattr(config, "_commit_hash", None)
    return made
