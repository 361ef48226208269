"""Heat maps lie where a prediction comes from, for attention and convolutions, and leave the model as it was."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.architectures import CONFIGS
from lora_dist_testing.backbones import make_backbone
from lora_dist_testing.tiny import make_config, make_image, make_model, write_bundle
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import (
    AutoModelForImageClassification,
    PerceiverForImageClassificationLearned,
    ViTImageProcessor,
)

from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.explain import SIDE, explained, file_of
from lora_dist.deployment.inputs import Files
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.model.heat_map import heat_maps
from lora_dist.model.trained.classifier import Classifier, load_classifier


class Red(nn.Module):
    """Says how red and how blue an image is, by convolutions and a mean over positions, or by tokens."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 2, 4, 4, bias=False))
        self.end = nn.ModuleList([nn.Flatten(2)]) if tokens else nn.ModuleList([nn.Identity()])
        with torch.no_grad():
            self.blocks[0].weight.zero_()
            self.blocks[0].weight[0, 0] = self.blocks[0].weight[1, 2] = 1

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.end[0](self.blocks(pixel_values)).flatten(2).mean(-1))


@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_the_map_is_where_the_class_is(size: tuple[int, int]) -> None:
    images = torch.zeros(2, 3, *size)
    images[0, 0, :8, :8] = images[1, 2, 16:24, -8:] = 1
    maps = heat_maps(Red(), images)
    assert maps.shape == (2, *size)
    assert maps[0, :12, :12].sum() > 0.99 * maps[0].sum()
    assert maps[1, 12:28, -12:].sum() > 0.99 * maps[1].sum()
    assert maps.amax(dim=(1, 2)).tolist() == [1, 1]
    images[0] += images[1]
    assert heat_maps(Red(), images[:1], classes=[1])[0, 12:28, -12:].sum() > 0.99 * maps[1].sum()


def test_tokens_before_those_of_the_patches_are_left_out(tmp_path: Path) -> None:
    """RADIO has ten of them; without one of them the rest would be a larger square."""
    model = load_base(str(make_backbone(tmp_path, "radio")), ["x", "y"], BaseOptions(pooling="mean")).model
    block, image = model.backbone.encoder.layer[-1], torch.randn(1, 3, 32, 32)
    seen: list[Tensor] = []
    with block.register_forward_hook(lambda _module, _inputs, output: seen.append(output)), torch.no_grad():
        model(image)
    last = seen[0].requires_grad_()
    assert last.shape[1] == 26
    with block.register_forward_hook(lambda _module, _inputs, _output: last):
        logit = model(image).logits.max()
    (steep,) = torch.autograd.grad(logit, last)
    assert not steep[:, :10].any(), "only patches are pooled"
    expected = (steep[:, 10:].mean(1, keepdim=True) * last[:, 10:]).sum(-1).relu().reshape(1, 1, 4, 4).detach()
    expected = interpolate(expected, (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(heat_maps(model, image), expected / expected.max())


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2", "swin", "convnext", "resnet", "mobilevit"])
def test_each_architecture_has_a_map_of_its_own_for_each_image(name: str) -> None:
    torch.manual_seed(0)
    size = 64 if name == "mobilevit" else 32
    model = AutoModelForImageClassification.from_config(make_config(name, size)).eval().requires_grad_(False)
    images = torch.randn(3, 3, size, size)
    maps = heat_maps(model, images)
    assert maps.shape == (3, size, size)
    assert maps.min() >= 0
    assert maps.max() == 1
    torch.testing.assert_close(heat_maps(model, images[1:2]), maps[1:2], rtol=1e-3, atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_blocks_in_no_list_have_maps_too() -> None:
    """As the stages of timm's RegNet."""

    class Stages(Red):
        def __init__(self) -> None:
            super().__init__()
            self.stage = self.blocks[0]
            del self.blocks, self.end

        def forward(self, pixel_values: Tensor) -> Any:
            return SimpleNamespace(logits=self.stage(pixel_values).mean(dim=(2, 3)))

    images = torch.zeros(1, 3, 32, 32)
    images[0, 0, :8, :8] = 1
    assert torch.equal(heat_maps(Stages(), images), heat_maps(Red(), images))


def test_a_model_without_feature_maps_is_named() -> None:
    class Means(nn.Module):
        def forward(self, pixel_values: Tensor) -> Any:
            return SimpleNamespace(logits=pixel_values.mean(dim=(2, 3)))

    with pytest.raises(UserError, match="Means has no feature map"):
        heat_maps(Means(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("latents", [16, 24])
def test_latents_are_no_places_of_an_image(latents: int) -> None:
    """Perceiver's would have the shape of a map, or the attention between them."""
    config = CONFIGS["perceiver"]()
    config.num_latents = latents
    model = PerceiverForImageClassificationLearned(config).eval()
    with pytest.raises(UserError, match=r"perceiver has no feature map .*: its last tokens are learned queries"):
        heat_maps(model, torch.zeros(1, 3, 32, 32))


def test_each_readable_image_gets_a_picture_and_keeps_its_row(tmp_path: Path) -> None:
    """With an adapter, after predictions in inference mode; images of one name in two folders."""
    write_bundle(tmp_path / "adapter", make_model(tmp_path / "vit"), ["a", "b"])
    classifier = load_classifier(tmp_path / "adapter")
    paths = [tmp_path / folder / "1.png" for folder in ("x", "y")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        make_image(number, number).save(path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [str(paths[0]), str(tmp_path / "bad.png"), str(paths[1])]
    device = torch.device("cpu")
    rows = list(classify(classifier, files, Inference(device, batch_size=2, num_workers=0), top_k=1))
    found = list(explained(iter(rows), Files(files), range(3), classifier, tmp_path / "maps", 2, device))
    assert found == rows
    other = {"a": "b", "b": "a"}
    swapped = [row._replace(top_k=[(other[label], score) for label, score in row.top_k]) for row in rows]
    list(explained(swapped, Files(files), range(3), classifier, tmp_path / "others", 2, device))
    others = [file_of(tmp_path / "others", str(path)) for path in paths]
    written = sorted((tmp_path / "maps").iterdir())
    assert written == sorted(file_of(tmp_path / "maps", str(path)) for path in paths)
    for file, swapped_file in zip(written, sorted(others), strict=True):
        picture = Image.open(file)
        assert picture.width > 2 * SIDE
        # Only the maps, on the right above the captions: of the class of the row, whatever is predicted here.
        maps = [np.asarray(Image.open(one))[:SIDE, SIDE:] for one in (file, swapped_file)]
        assert (maps[0] != maps[1]).any()
    with pytest.raises(UserError, match="--explain"):
        list(explained(rows, Files(files), range(3), classifier, paths[0], 2, device))


def test_of_classes_with_one_name_the_predicted_one_is_explained(tmp_path: Path) -> None:
    """ImageNet has two cranes."""
    image = Image.new("RGB", (32, 32))
    image.paste((0, 0, 255), (16, 16, 24, 24))
    image.save(tmp_path / "a.png")
    maps: list[np.ndarray] = []
    for labels in (["crane", "crane"], ["red", "blue"]):
        processor = ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False)
        classifier = Classifier(Red(), processor, labels)
        inputs = Files([str(tmp_path / "a.png")])
        inference = Inference(torch.device("cpu"))
        rows = classify(classifier, inputs, inference, top_k=1)
        list(explained(rows, inputs, [0], classifier, tmp_path / labels[1], None, inference.device))
        maps.append(np.asarray(Image.open(file_of(tmp_path / labels[1], str(tmp_path / "a.png"))))[:SIDE])
    assert (maps[0] == maps[1]).all()
