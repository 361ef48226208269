"""Tiny models with random weights and small learnable image folders, written to disk as users have them."""

import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    CLIPConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    HGNetV2Config,
    MetaClip2Config,
    MobileViTConfig,
    MobileViTImageProcessor,
    PoolFormerConfig,
    PPLCNetConfig,
    PreTrainedConfig,
    ResNetConfig,
    SiglipConfig,
    SwiftFormerConfig,
    SwinConfig,
    Swinv2Config,
    ViTConfig,
    ViTImageProcessor,
)

from lora_dist.data.pixels.images import opened
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.pixels.views import stack
from lora_dist_testing.edits import edit_json

ARCHITECTURES = ("vit", "deit", "beit", "swin", "swinv2", "dinov2", "convnext", "resnet", "mobilevit")
WITHOUT_PREFIX = ("clip", "siglip", "metaclip_2", "hgnet_v2")
"""Classifiers without a module of the name `base_model_prefix`."""


def make_config(architecture: str, image_size: int = 32) -> PreTrainedConfig:
    """A configuration with some thousands of parameters."""
    plain: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": image_size,
        "patch_size": 8,
    }
    windowed: dict[str, Any] = {
        "image_size": image_size,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    text = plain | {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    two_towers: dict[str, Any] = {"text_config": text | {"pad_token_id": 0}, "vision_config": plain}
    configs = {
        "clip": lambda: CLIPConfig(**two_towers, projection_dim=16),
        "siglip": lambda: SiglipConfig(**two_towers),
        "metaclip_2": lambda: MetaClip2Config(**two_towers, projection_dim=16),
        "hgnet_v2": lambda: HGNetV2Config(
            embedding_size=8,
            hidden_sizes=[16, 16, 32, 32],
            depths=[1, 1, 1, 1],
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 16, 16, 32],
            stage_mid_channels=[8] * 4,
            stage_out_channels=[16, 16, 32, 32],
            stage_num_blocks=[1] * 4,
            stage_numb_of_layers=[2] * 4,
        ),
        "pp_lcnet": lambda: PPLCNetConfig(scale=0.25, class_expand=32),
        "poolformer": lambda: PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], mlp_ratio=2.0),
        "swiftformer": lambda: SwiftFormerConfig(embed_dims=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
        "vit": lambda: ViTConfig(**plain),
        "deit": lambda: DeiTConfig(**plain),
        "beit": lambda: BeitConfig(**plain),
        "dinov2": lambda: Dinov2Config(**plain),
        "swin": lambda: SwinConfig(**windowed),
        "swinv2": lambda: Swinv2Config(**windowed),
        "convnext": lambda: ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0
        ),
        "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        "mobilevit": lambda: MobileViTConfig(
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
            num_attention_heads=2,
            initializer_range=0.3,
        ),
    }
    config = configs[architecture]()
    config.architectures = [type(config).__name__.replace("Config", "ForImageClassification")]
    return config


def make_model(
    directory: Path, architecture: str = "vit", num_labels: int = 2, image_size: int = 32, seed: int = 0
) -> Path:
    """Writes a model with random weights and its processor, and returns the directory."""
    torch.manual_seed(seed)
    config = make_config(architecture, image_size)
    config.num_labels = num_labels
    AutoModelForImageClassification.from_config(config).save_pretrained(directory)
    if architecture == "mobilevit":
        processor: Any = MobileViTImageProcessor(
            size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}, do_flip_channel_order=True
        )
    else:
        processor = ViTImageProcessor(size={"height": image_size, "width": image_size})
    processor.save_pretrained(directory)
    return directory


def make_remote_model(directory: Path) -> Path:
    """Writes a model whose code comes with it, and returns the directory."""
    model = AutoModelForImageClassification.from_pretrained(make_model(directory))
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "remote.py").write_text(
        "from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor\n"
        "class RemoteConfig(ViTConfig):\n    model_type = 'remote_vit'\n"
        "class RemoteModel(ViTForImageClassification):\n    config_class = RemoteConfig\n"
        "class RemoteProcessor(ViTImageProcessor):\n    pass\n"
    )
    remote: dict[str, dict[str, Any]] = {
        "config.json": {
            "model_type": "remote_vit",
            "architectures": ["RemoteModel"],
            "auto_map": {
                "AutoConfig": "remote.RemoteConfig",
                "AutoModelForImageClassification": "remote.RemoteModel",
            },
        },
        "preprocessor_config.json": {
            "image_processor_type": "RemoteProcessor",
            "auto_map": {"AutoImageProcessor": "remote.RemoteProcessor"},
        },
    }
    for name, changes in remote.items():
        edit_json(directory / name, **changes)
    return directory


def load_adapter(model: Any, directory: Path, name: str = "default", num_labels: int | None = None) -> Any:
    """Reads an adapter and puts it on its base."""
    from lora_dist.model.lora import adapter_io, adapters

    return adapters.attach_adapter(model, adapters.adapter_for(model, adapter_io.read(directory)), name, num_labels)


def perturb(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Moves everything that trains, as training does: a fresh adapter changes nothing, and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def write_bundle(
    directory: Path,
    base_model: Path,
    labels: Sequence[str],
    *,
    seed: int = 0,
    scale: float = 0.2,
    card: str = "card\n",
    tuning: Any = "lora",
    **lora: Any,
) -> tuple[Any, Any]:
    """Writes the bundle of an adapter with perturbed weights; returns its model and the base it was made on."""
    from lora_dist.model.base.backbone import load_base
    from lora_dist.model.lora.trainable import make_trainable
    from lora_dist.model.trained.bundle import write_adapter
    from lora_dist.settings.train import LoraSettings, ModelSettings

    base = load_base(str(base_model), list(labels))
    model = make_trainable(base, ModelSettings(tuning=tuning), LoraSettings(**lora))
    perturb(model, seed, scale)
    write_adapter(directory, model, base, card)
    return model, base


def make_image(label: int, number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A noisy picture whose stripes tell its class."""
    noise = np.random.default_rng([label, number])
    width, height = size
    waves = np.sin(np.arange(width)[None, :] * (label + 1) / 3 + np.zeros((height, 1)))
    color = np.array([[80, 160, 120], [160, 90, 60], [60, 100, 170]])[label % 3]
    pixels = waves[..., None] * 60 + color + noise.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def view_of(transforms: ImageTransforms, image: Image.Image, seed: tuple[int, ...]) -> Tensor:
    """A view of an image as the model takes it, float32 [3, H, W]."""
    with opened(image) as picture:
        return transforms.model_input(*stack([transforms.view(picture, seed)]))[0]


def make_folder(
    directory: Path,
    classes: Sequence[str] = ("a", "b", "c"),
    per_class: int | Sequence[int] = 4,
    size: tuple[int, int] = (40, 32),
    first: int = 0,
) -> Path:
    """Writes class folders of PNG files, and returns the directory."""
    counts = [per_class] * len(classes) if isinstance(per_class, int) else per_class
    for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
        (directory / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            make_image(label, number, size).save(directory / name / f"{number:03d}.png")
    return directory


CLASSES = ("a", "b", "c")


def make_png(label: int, number: int) -> bytes:
    """An image of `make_image` as the content of a file."""
    content = io.BytesIO()
    make_image(label, number).save(content, "PNG")
    return content.getvalue()


def write_parquet(path: Path, samples: Iterable[tuple[bytes, int]], rows_in_group: int = 1000) -> None:
    """Writes encoded images and their labels as the Hub's data sets have them."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = [{"image": {"bytes": content, "path": None}, "label": label} for content, label in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path, row_group_size=rows_in_group)


def write_tar(path: Path, samples: Iterable[tuple[bytes, int]]) -> None:
    """Writes encoded images and their labels as a shard of WebDataset."""
    write_members(path, ({"png": content, "cls": str(label).encode()} for content, label in samples))


def write_members(path: Path, samples: Iterable[Mapping[str, bytes]]) -> None:
    """Writes samples as a shard of WebDataset: the content of each member by its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{path.stem}-{number:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def make_shards(
    directory: Path, counts: Sequence[int], validation: int = 9, tar: bool = False, rows_in_group: int = 1000
) -> Path:
    """Writes a data set in shards with so many samples for training, and one for validation.

    Image `n` of the training split is `make_image(n % 3, n)`.
    """
    names = [f"train-{index:05d}-of-{len(counts):05d}" for index in range(len(counts))]
    starts = np.cumsum([0, *counts])
    parts = {name: range(start, start + count) for name, start, count in zip(names, starts, counts, strict=False)}
    for name, numbers in (parts | {"validation-00000-of-00001": range(1000, 1000 + validation)}).items():
        samples = [(make_png(number % 3, number), number % 3) for number in numbers]
        if tar:
            write_tar(directory / f"{name}.tar", samples)
        else:
            write_parquet(directory / f"{name}.parquet", samples, rows_in_group)
    return directory
