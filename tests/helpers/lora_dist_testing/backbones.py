"""Tiny backbones without a head, with random weights, written to disk with an image processor."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Aimv2VisionConfig,
    BlipConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPVisionConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    GroupViTConfig,
    PixioConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    RadioConfig,
    SamVisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from lora_dist.model.base.pooled_backbone import make_backbone as build
from lora_dist_testing.architectures import PLAIN

_TEXT = {**PLAIN, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
_TOWERS: dict[str, Any] = {"text_config": _TEXT | {"pad_token_id": 0}, "vision_config": PLAIN}
_CONFIGS = {
    "dinov3_vit": lambda: DINOv3ViTConfig(**PLAIN, num_register_tokens=2),
    "dinov3_convnext": lambda: DINOv3ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4),
    "radio": lambda: RadioConfig(**{**PLAIN, "mlp_ratio": 2.0, "max_img_size": 128}),
    "aimv2": lambda: Aimv2VisionConfig(**PLAIN),
    "aimv2_without_pooler": lambda: Aimv2VisionConfig(**PLAIN, use_head=False),
    "clip_vision": lambda: CLIPVisionConfig(**PLAIN),
    "siglip_vision": lambda: SiglipVisionConfig(**PLAIN),
    "pixio": lambda: PixioConfig(**PLAIN),
    "sam_vision": lambda: SamVisionConfig(
        **{**PLAIN, "output_channels": 16, "mlp_dim": 64, "global_attn_indexes": [1], "window_size": 2}
    ),
    "vit_mae": lambda: ViTMAEConfig(
        **PLAIN,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "blip_vision": lambda: BlipVisionConfig(**PLAIN),
    "pixtral": lambda: PixtralVisionConfig(**PLAIN),
    "blip": lambda: BlipConfig(text_config=_TEXT | {"encoder_hidden_size": 32}, vision_config=PLAIN, projection_dim=16),
    "groupvit": lambda: GroupViTConfig(
        text_config=_TEXT,
        vision_config=PLAIN | {"depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 0]},
        projection_dim=16,
        projection_intermediate_dim=16,
    ),
    "clip": lambda: CLIPConfig(**_TOWERS, projection_dim=16),
    "siglip": lambda: SiglipConfig(**_TOWERS),
}
TOWERS = ("blip", "groupvit", "clip", "siglip")
"""Checkpoints of an image and a text tower."""
BACKBONES = tuple(name for name in _CONFIGS if name not in (*TOWERS, "pixtral"))
"""Checkpoints without a classifier class in `transformers`."""


def make_backbone_config(name: str) -> PreTrainedConfig:
    """A configuration of some thousands of parameters, for images of 32 pixels."""
    return _CONFIGS[name]()


def make_backbone(directory: Path, name: str, seed: int = 0) -> Path:
    """Writes a checkpoint of the backbone alone, or of both towers, with a processor; returns the directory."""
    torch.manual_seed(seed)
    config = make_backbone_config(name)
    made = ViTMAEForPreTraining(config) if name == "vit_mae" else build(config)
    made.save_pretrained(directory)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory
