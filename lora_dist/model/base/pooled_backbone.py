"""An image classifier for backbones without a head: `AutoModel`, pooled features and a linear layer.

Imports only torch and transformers: `save_pretrained` writes a copy of this file next to an adapter or model, so that
`trust_remote_code=True` loads it where lora_dist is not installed.
"""

from typing import Any

import transformers
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class PooledBackboneConfig(PreTrainedConfig):
    """Configuration of `PooledBackboneForImageClassification`.

    Attributes:
        backbone_config: configuration of the backbone.
        pooling: `pooler` (the output of the backbone's own pooler), `class_token`, or `mean` (of the patch tokens).
        prefix_tokens: class and register tokens before the patches.
        feature_size: width of the pooled features.
    """

    model_type = "pooled_backbone"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    backbone_config: dict | PreTrainedConfig | None = None
    pooling: str = "pooler"
    prefix_tokens: int = 0
    feature_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        super().__post_init__(**kwargs)


class PooledBackboneForImageClassification(PreTrainedModel):
    """A backbone and a linear layer on its pooled features; also loads the checkpoint of the backbone alone."""

    config_class = PooledBackboneConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True

    def __init__(self, config: PooledBackboneConfig) -> None:
        super().__init__(config)
        self.backbone = make_backbone(config.backbone_config)
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.classifier = nn.Linear(config.feature_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Computes logits [B, classes] of images [B, 3, H, W]; with `labels` [B], also the cross entropy."""
        outputs = self.backbone(pixel_values)
        logits = self.classifier(pooled(outputs, self.config.pooling, self.config.prefix_tokens))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_backbone(config: Any) -> Any:
    """Builds the model of a configuration as `AutoModel` does, which lacks some vision towers, such as BLIP's."""
    own = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    if own is None or type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config)
    return own._from_config(config)


def pooled(outputs: Any, pooling: str, prefix_tokens: int) -> Tensor:
    """Returns features [B, C] of a backbone's outputs: tokens [B, N, C] or [B, C, H, W], and those of its pooler."""
    if pooling == "pooler":
        features = outputs["summary"] if outputs.get("pooler_output") is None else outputs["pooler_output"]
        return features.flatten(1)
    tokens = outputs["last_hidden_state"]
    if tokens.dim() == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    return tokens[:, 0] if pooling == "class_token" else tokens[:, prefix_tokens:].mean(dim=1)
