"""Tiny checkpoints of every class behind `AutoModelForImageClassification`, with processors as on the Hub."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from lora_dist_testing.tiny import make_config

PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bit": lambda: hf.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4),
    "convnextv2": lambda: hf.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "cvt": lambda: hf.CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    "data2vec-vision": lambda: hf.Data2VecVisionConfig(**PLAIN),
    "dinat": lambda: hf.DinatConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 2], kernel_size=3),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersConfig(**PLAIN),
    "donut-swin": lambda: hf.DonutSwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "efficientnet": lambda: hf.EfficientNetConfig(
        image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320
    ),
    "focalnet": lambda: hf.FocalNetConfig(
        image_size=32, embed_dim=16, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3]
    ),
    "hiera": lambda: hf.HieraConfig(
        image_size=[32, 32],
        embed_dim=16,
        depths=[1, 1],
        num_heads=[1, 2],
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        num_query_pool=1,
    ),
    "ijepa": lambda: hf.IJepaConfig(**PLAIN),
    "imagegpt": lambda: hf.ImageGPTConfig(vocab_size=8, n_positions=64, n_embd=16, n_layer=1, n_head=2),
    "levit": lambda: hf.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[1, 2, 2],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
    ),
    "mobilenet_v1": lambda: hf.MobileNetV1Config(image_size=32, depth_multiplier=0.25, classifier_dropout_prob=0.1),
    "mobilenet_v2": lambda: hf.MobileNetV2Config(image_size=32, depth_multiplier=0.25),
    "mobilevitv2": lambda: hf.MobileViTV2Config(image_size=64, width_multiplier=0.25),
    "perceiver": lambda: hf.PerceiverConfig(
        num_latents=8,
        d_latents=16,
        d_model=32,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        image_size=32,
    ),
    "pvt": lambda: hf.PvtConfig(
        image_size=32,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        sequence_reduction_ratios=[4, 2, 1, 1],
    ),
    "pvt_v2": lambda: hf.PvtV2Config(
        image_size=32,
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        sr_ratios=[2, 2, 1, 1],
    ),
    "regnet": lambda: hf.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], groups_width=4
    ),
    "segformer": lambda: hf.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 32],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "siglip2": lambda: hf.Siglip2Config(
        text_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "intermediate_size": 32,
            "max_position_embeddings": 8,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_patches": 16,
            "patch_size": 8,
        },
    ),
    "shieldgemma2": lambda: hf.ShieldGemma2Config(
        text_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "vocab_size": 64,
            "intermediate_size": 16,
            "head_dim": 16,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 16,
            "image_size": 32,
            "patch_size": 8,
        },
        mm_tokens_per_image=4,
    ),
    "textnet": lambda: hf.TextNetConfig(
        stem_kernel_size=3,
        stem_stride=2,
        stem_num_channels=3,
        stem_out_channels=8,
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
        conv_layer_strides=[[1], [2], [2], [2]],
        hidden_sizes=[8, 8, 16, 16, 32],
    ),
    "vit_msn": lambda: hf.ViTMSNConfig(**PLAIN),
}
"""Configurations of what `tiny.make_config` has not, of some thousands of parameters."""

EDGE, SQUARE = {"shortest_edge": 36}, {"height": 32, "width": 32}


def _crop(processor: Any) -> Callable[[], Any]:
    return lambda: processor(size=EDGE, crop_size=SQUARE, do_center_crop=True)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "beit": lambda: hf.BeitImageProcessor(size=SQUARE, do_center_crop=False),
    "bit": _crop(hf.BitImageProcessor),
    "clip": _crop(hf.CLIPImageProcessor),
    "metaclip_2": _crop(hf.CLIPImageProcessor),
    "convnext": lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "convnextv2": lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "cvt": lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "regnet": lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "resnet": lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "data2vec-vision": lambda: hf.BeitImageProcessor(size=SQUARE, do_center_crop=False),
    "deit": lambda: hf.DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size=SQUARE),
    "dinov2": _crop(hf.BitImageProcessor),
    "dinov2_with_registers": _crop(hf.BitImageProcessor),
    "donut-swin": lambda: hf.DonutImageProcessor(size=SQUARE, do_align_long_axis=False),
    "efficientnet": lambda: hf.EfficientNetImageProcessor(size=SQUARE, include_top=True),
    "focalnet": _crop(hf.BitImageProcessor),
    "hgnet_v2": lambda: hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "hiera": _crop(hf.BitImageProcessor),
    "imagegpt": lambda: hf.ImageGPTImageProcessor(
        clusters=[[-1.0 + 0.25 * i] * 3 for i in range(8)], size={"height": 8, "width": 8}
    ),
    "levit": lambda: hf.LevitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
    "mobilenet_v1": _crop(hf.MobileNetV1ImageProcessor),
    "mobilenet_v2": _crop(hf.MobileNetV2ImageProcessor),
    "mobilevit": lambda: hf.MobileViTImageProcessor(
        size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}, do_flip_channel_order=True
    ),
    "mobilevitv2": lambda: hf.MobileViTImageProcessor(
        size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}, do_flip_channel_order=True
    ),
    "perceiver": lambda: hf.PerceiverImageProcessor(size=SQUARE, crop_size={"height": 36, "width": 36}),
    "poolformer": lambda: hf.PoolFormerImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, crop_pct=0.9
    ),
    "pp_lcnet": lambda: hf.PPLCNetImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE),
    "pvt": lambda: hf.PvtImageProcessor(size=SQUARE),
    "pvt_v2": lambda: hf.PvtImageProcessor(size=SQUARE),
    "segformer": lambda: hf.SegformerImageProcessor(size={"height": 64, "width": 64}),
    "siglip": lambda: hf.SiglipImageProcessor(size=SQUARE),
    "siglip2": lambda: hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    "shieldgemma2": lambda: hf.Gemma3ImageProcessor(size=SQUARE),
    "swiftformer": lambda: hf.ViTImageProcessor(size={"height": 64, "width": 64}),
    "textnet": lambda: hf.TextNetImageProcessor(size={"shortest_edge": 64}),
}
"""Processors that are not `ViTImageProcessor` of 32 pixels."""

TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "timm vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        32,
    ),
    "timm convnext": ("convnext_tiny", {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]}, 32),
    "timm resnet": ("test_resnet", {}, 32),
    "timm efficientnet": ("test_efficientnet", {}, 32),
    "timm mobilenetv4": ("mobilenetv4_conv_small_035", {}, 32),
    "timm eva02": (
        "eva02_tiny_patch14_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2},
        32,
    ),
    "timm swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
        32,
    ),
    "timm coat": (
        "coat_lite_tiny",
        {"img_size": 64, "embed_dims": [16, 16, 16, 16], "serial_depths": [1, 1, 1, 1], "num_heads": 8},
        64,
    ),
}
"""Name in timm, arguments, and image size."""

CLASSES = {
    "perceiver": "PerceiverForImageClassificationLearned",
    "levit": "LevitForImageClassificationWithTeacher",
    "deit": "DeiTForImageClassification",
    "hgnet_v2": "HGNetV2ForImageClassification",
}
"""Classes of which `AutoModelForImageClassification` has several for a configuration, or whose name is another."""


def make_checkpoint(directory: Path, name: str, num_labels: int = 2, seed: int = 0) -> Path:
    """Writes a tiny random checkpoint of a model type of transformers, with its processor, and returns `directory`."""
    torch.manual_seed(seed)
    if name in TIMM:
        return _make_timm(directory, name, num_labels)
    config = CONFIGS[name]() if name in CONFIGS else make_config(name)
    config.num_labels = num_labels
    if name in CLASSES:
        config.architectures = [CLASSES[name]]
    if name == "dinat":
        # It needs natten, which takes an hour to build; without it, what the checkpoint holds does not matter.
        config.architectures = ["DinatForImageClassification"]
        config.save_pretrained(directory)
        hf.ViTImageProcessor(size=SQUARE).save_pretrained(directory)
        save_file({"x": torch.zeros(1)}, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    model = AutoModelForImageClassification.from_config(config)
    processor = PROCESSORS.get(name, lambda: hf.ViTImageProcessor(size=SQUARE))()
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        _train_norms(model, norms, torch.randn(8, 3, 64, 64))
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _train_norms(model: Any, norms: Sequence[Any], pixels: torch.Tensor) -> None:
    """Gives batch norms the statistics of their inputs, as training does, or the signal of an image dies away."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        torch.nn.init.ones_(norm.weight)
    model.train()(pixels)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _make_timm(directory: Path, name: str, num_labels: int) -> Path:
    """A checkpoint as those of timm on the Hub, which have no `num_classes` among their arguments."""
    import timm

    architecture, arguments, size = TIMM[name]
    model = timm.create_model(architecture, num_classes=num_labels, **arguments)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        _train_norms(model, norms, torch.randn(8, 3, 64, 64))
    _unshare(model)
    model.pretrained_cfg |= {"input_size": (3, size, size), "num_classes": num_labels, "crop_pct": 0.9}
    timm.models.save_for_hf(model, directory, model_args=arguments, safe_serialization=True)
    config = json.loads((directory / "config.json").read_text())
    config.get("model_args", {}).pop("num_classes", None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _unshare(model: torch.nn.Module) -> None:
    """Gives each name of a module that has several its own copy of the weights, as in the files of CoaT on the Hub."""
    seen: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen and any(True for _ in module.parameters()):
            model.set_submodule(name, copy.deepcopy(module))
        seen.add(id(module))
