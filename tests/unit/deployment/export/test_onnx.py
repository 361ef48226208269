"""ONNX export: the file says what the model says, carries all that is needed, and is refused where it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lora_dist_testing.architectures import PROCESSORS as ARCHITECTURE_PROCESSORS
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.edits import edit_json
from lora_dist_testing.processors import PROCESSORS
from lora_dist_testing.tiny import make_folder, make_model, write_bundle
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from lora_dist.data.pixels.images import load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.demo import photographs
from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.export import onnx_export
from lora_dist.deployment.export.onnx_export import RoundingCost, export
from lora_dist.deployment.export.onnx_model import load_onnx
from lora_dist.deployment.export.preprocessing import describe
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.trained.classifier import Classifier, load_classifier

LABELS = ["a", "b, c", "émoji 🦊"]
PHOTOGRAPHS = photographs()


@pytest.fixture(scope="module")
def adapter(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundles") / "adapter"
    write_bundle(directory, vit, LABELS, scale=0.5, lora_r=4)
    # As of a model on the Hub whose code transformers has taken over.
    edit_json(directory / "preprocessor_config.json", auto_map={"AutoImageProcessor": "processing.ViTImageProcessor"})
    return directory


@pytest.fixture(scope="module")
def exported(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    difference, cost, half = export(load_classifier(adapter), out, [])
    assert 0 <= difference <= onnx_export.TOLERANCE
    assert cost is half is None
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    return out


def _random(directory: Path) -> Classifier:
    """A base model with a head of three classes and random weights."""
    base = load_base(str(directory), LABELS)
    return Classifier(base.model.eval(), base.processor, LABELS)


@torch.inference_mode()
def _logits(classifier: Classifier, images: list[Image.Image]) -> Tensor:
    return classifier.model(pixel_values=ImageTransforms(classifier.processor).batch(images)).logits


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_a_batch_of_any_size_says_what_the_adapter_says(count: int, adapter: Path, exported: Path) -> None:
    images = [load_rgb(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]) for number in range(count)]
    expected = _logits(load_classifier(adapter), images)
    read = load_onnx(exported)
    assert read.labels == LABELS
    torch.testing.assert_close(_logits(read, images), expected, rtol=0, atol=1e-4)


def test_it_holds_the_merged_model_alone(exported: Path) -> None:
    """LoRA left beside its base would show as more weights, and as their names."""
    proto = onnx.load(exported)
    onnx.checker.check_model(proto)
    assert not [tensor.name for tensor in proto.graph.initializer if "lora" in tensor.name]
    (pixels,), (logits,) = proto.graph.input, proto.graph.output
    shapes = [
        [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (pixels, logits)
    ]
    assert (pixels.name, logits.name) == ("pixel_values", "logits")
    assert shapes == [["batch", 3, 32, 32], ["batch", 3]]


def _by_the_description(text: str, file: str) -> np.ndarray:
    """What someone does who reads the metadata and knows nothing of this package: Pillow and numpy."""
    steps = [step.partition(". ")[2] for step in text.split("; ")]
    image = Image.open(file).convert("RGB")
    pixels = np.zeros(())
    for step in steps:
        words = step.replace(",", "").split()
        if step.startswith("resize"):
            how = next(word for word in words if word in ("bilinear", "bicubic")).upper()
            if "shorter side" in step:
                edge = int(words[words.index("pixels") - 1])
                short = min(image.size)
                size = tuple(edge if side == short else int(side * edge / short) for side in image.size)
            else:
                size = (int(words[4]), int(words[2]))
            image = image.resize(size, Image.Resampling[how])
        elif step.startswith("cut"):
            height, width = int(words[3]), int(words[5])
            rounded = int if "rounded down" in step else round
            left, top = rounded((image.width - width) / 2), rounded((image.height - height) / 2)
            image = image.crop((left, top, left + width, top + height))
        elif step.startswith("multiply"):
            pixels = np.asarray(image) * float(words[2])
        elif step.startswith("subtract"):
            mean, std = (json.loads(f"[{part.partition(']')[0]}]") for part in step.split("[")[1:])
            pixels = (pixels - mean) / std
        elif step.startswith("float32"):
            if "(blue green red)" in " ".join(words):
                pixels = pixels[..., ::-1]
            pixels = pixels.transpose(2, 0, 1)
    return pixels


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("file", PHOTOGRAPHS[:2], ids=["one", "another"])
def test_the_preprocessing_can_be_followed_from_its_description(name: str, file: str) -> None:
    processor = PROCESSORS[name]()
    transforms = ImageTransforms(processor)
    expected = transforms.evaluation(load_rgb(file)).numpy()
    text = describe(transforms)
    followed = _by_the_description(text, file)
    assert followed.shape == expected.shape, text
    assert not text.startswith("missing")
    # Pillow and torchvision round differently: by one step of 8 bits, now and then by two.
    assert np.abs(followed - expected).max() < 2.5 / 255 / 0.26, text


@pytest.mark.parametrize("name", ["deit", "levit", "efficientnet", "poolformer", "timm resnet"])
def test_the_description_is_what_the_processor_does_not_what_its_settings_say(name: str, tmp_path: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(make_checkpoint(tmp_path, name))
    for file in PHOTOGRAPHS[:2]:
        transforms = ImageTransforms(processor)
        expected = transforms.evaluation(load_rgb(file)).numpy()
        followed = _by_the_description(describe(transforms), file)
        assert followed.shape == expected.shape
        assert np.abs(followed - expected).max() < 2.5 / 255 / 0.2


def test_what_cannot_be_said_in_words_is_said_to_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    """Perceiver's processor cuts a share of the image out before it resizes."""
    processor = ARCHITECTURE_PROCESSORS["perceiver"]()
    assert describe(ImageTransforms(processor)).startswith(
        "missing: the steps of PerceiverImageProcessor cannot be described"
    )
    assert "cannot be described in words" in caplog.text


def test_the_metadata_are_enough_without_this_package(adapter: Path, exported: Path) -> None:
    """ONNX Runtime, Pillow and numpy, and nothing else."""
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == LABELS
    pixels = np.stack([_by_the_description(metadata["preprocessing"], file) for file in PHOTOGRAPHS])
    (logits,) = session.run(None, {"pixel_values": pixels.astype(np.float32)})
    expected = _logits(load_classifier(adapter), [load_rgb(file) for file in PHOTOGRAPHS])
    assert np.abs(logits - expected.numpy()).max() < 0.05 * float(expected.abs().max())
    assert logits.argmax(axis=1).tolist() == expected.argmax(dim=1).tolist()


@pytest.mark.parametrize("architecture", ["swin", "convnext"])
def test_other_architectures_can_be_exported(architecture: str, tmp_path: Path) -> None:
    """Those whose graphs differ most from a ViT's: windows folded into the batch, and convolutions."""
    model = _random(make_model(tmp_path / "model", architecture))
    difference, *_ = export(model, tmp_path / "model.onnx", [])
    assert difference <= 1e-4
    images = [load_rgb(file) for file in PHOTOGRAPHS[:3]]
    torch.testing.assert_close(_logits(load_onnx(tmp_path / "model.onnx"), images), _logits(model, images))


def test_attention_over_more_than_tokens_and_heads_can_be_exported(tmp_path: Path) -> None:
    """Hiera of timm has windows as well, and torch.onnx has fused attention for [B, heads, tokens, width] alone."""
    timm = pytest.importorskip("timm")
    arguments = {"img_size": [64, 64], "embed_dim": 16, "stages": [1, 1, 1, 1]}
    hiera = timm.create_model("hiera_tiny_224", num_classes=3, **arguments)
    hiera.pretrained_cfg |= {"input_size": (3, 64, 64), "num_classes": 3}
    timm.models.save_for_hf(hiera, tmp_path / "hiera", model_args=arguments, safe_serialization=True)
    difference, *_ = export(_random(tmp_path / "hiera"), tmp_path / "model.onnx", [])
    assert difference <= 1e-4


class Wrong(nn.Module):
    """Says something else when it is exported than when it is asked."""

    def __init__(self, inner: nn.Module, off_by: float) -> None:
        super().__init__()
        self.inner = inner
        self.off_by = off_by

    def forward(self, pixel_values: Tensor) -> Any:
        answer = self.inner(pixel_values=pixel_values)
        if torch.compiler.is_exporting():
            answer.logits = answer.logits * (1 + self.off_by)
        return answer


def test_an_export_that_says_something_else_is_refused_and_leaves_nothing(vit: Path, tmp_path: Path) -> None:
    classifier = _random(vit)
    wrong = Classifier(Wrong(classifier.model, 1e-3), classifier.processor, classifier.labels)
    with pytest.raises(UserError, match=r"differ from PyTorch's by 1\.0e-03 of the largest.*nothing was written"):
        export(wrong, tmp_path / "model.onnx", [])
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    """Takes its number of images for a constant."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor) -> Any:
        if torch.compiler.is_exporting() and pixel_values.shape[0] != 2:
            raise ValueError("two, please")
        return self.inner(pixel_values=pixel_values)


class Undecided(Fixed):
    """Goes another way with every image."""

    def forward(self, pixel_values: Tensor) -> Any:
        return self.inner(pixel_values=pixel_values if pixel_values.sum() > 0 else -pixel_values)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Fixed, "only for a batch of 2"),
        # The exporter of torch 2.8 takes one way for all images, and the comparison finds that.
        (Undecided, r"(torch\.onnx cannot export Undecided: .|differ from PyTorch's)"),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_by_name(
    kind: type[Fixed], words: str, vit: Path, tmp_path: Path
) -> None:
    classifier = _random(vit)
    odd = Classifier(kind(classifier.model), classifier.processor, classifier.labels)
    with pytest.raises(UserError, match=rf"--onnx .*model\.onnx: .*{words}"):
        export(odd, tmp_path / "model.onnx", [])
    assert not list(tmp_path.iterdir())


def test_weights_beyond_what_a_file_can_hold_are_refused(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="an ONNX file can have 2 GB"):
        export(_random(vit), tmp_path / "model.onnx", [])


def test_nothing_that_is_there_is_overwritten(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a directory; name a file, such as .*model\.onnx"):
        export(_random(vit), tmp_path, [])
    out = tmp_path / "model.onnx"
    out.write_text("old")
    with pytest.raises(UserError, match=r"model\.onnx exists; choose another file"):
        export(_random(vit), out, [])
    assert out.read_text() == "old"


def test_what_is_no_file_of_ours_is_refused_by_name(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.onnx: no such file; pass an --adapter"):
        load_onnx(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match=r"text\.onnx: ONNX Runtime cannot load it"):
        load_onnx(tmp_path / "text.onnx")
    proto = onnx.load(exported)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "bare.onnx")
    with pytest.raises(UserError, match=r"bare\.onnx: its metadata lack labels"):
        load_onnx(tmp_path / "bare.onnx")
    onnx.helper.set_model_props(proto, {"labels": "[]", "preprocessor_config": '{"size": 3}'})
    onnx.save(proto, tmp_path / "odd.onnx")
    with pytest.raises(UserError, match=r"odd\.onnx: invalid preprocessing in its metadata"):
        load_onnx(tmp_path / "odd.onnx")


def test_metadata_that_name_code_neither_run_it_nor_ask(exported: Path, tmp_path: Path) -> None:
    """Whatever stands on the standard input, such as the answer to somebody else's question."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "evil.py").write_text(
        f"open({str(tmp_path / 'was_run')!r}, 'w')\nfrom transformers import ViTImageProcessor as Evil\n"
    )
    proto = onnx.load(exported)
    config = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": f"{code}--evil.Evil"}}
    onnx.helper.set_model_props(proto, {"labels": "[]", "preprocessor_config": json.dumps(config)})
    onnx.save(proto, tmp_path / "evil.onnx")
    program = "import sys, pathlib, lora_dist.deployment.export.onnx_model as m; m.load_onnx(pathlib.Path(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "evil.onnx"],
        input="y\n" * 9,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert not (tmp_path / "was_run").exists()
    assert "[y/N]" not in result.stdout
    assert "invalid preprocessing in its metadata" in result.stderr


def test_int8_is_smaller_and_its_cost_is_what_can_be_counted(adapter: Path, tmp_path: Path) -> None:
    """On folders of which some are named as classes, with a file that cannot be read."""
    folder = make_folder(tmp_path / "photos", classes=("a", "b, c", "elsewhere"), per_class=20)
    (folder / "a" / "zz.png").write_text("broken")
    files = [str(path) for path in sorted(folder.rglob("*.png"))]
    difference, cost, _ = export(load_classifier(adapter), tmp_path / "int8.onnx", files, int8=True)
    assert difference <= 1e-4
    export(load_classifier(adapter), tmp_path / "fp32.onnx", files)
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "fp32.onnx").stat().st_size
    # The batches of a prediction: int8 scales its inputs by the largest of a batch.
    inference = Inference(torch.device("cpu"), num_workers=0)
    before, after = (
        [
            row.top_k[0][0] if row.top_k else None
            for row in classify(load_onnx(tmp_path / name), files, inference, top_k=1)
        ]
        for name in ("fp32.onnx", "int8.onnx")
    )
    truth = [Path(file).parent.name for file in files]
    right = [sum(row == true for row, true in zip(rows, truth, strict=True)) for rows in (before, after)]
    changed = sum(one != other for one, other in zip(before, after, strict=True))
    assert cost == RoundingCost("int8", 60, changed, 40, *right)
    for name, weights in (("fp32", "fp32"), ("int8", "int8, dynamic")):
        metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / f"{name}.onnx").metadata_props}
        assert metadata["weights"] == weights
    operators = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "MatMulInteger" in operators
    assert "ConvInteger" not in operators


@pytest.mark.parametrize("architecture", ["vit", "convnext"])
def test_fp16_is_half_as_large_and_gives_the_same_classes(architecture: str, tmp_path: Path) -> None:
    """On real images. Clients go on to pass and to get fp32."""
    model = _random(make_model(tmp_path / "model", architecture))
    out = tmp_path / "fp16.onnx"
    images = [load_rgb(file) for file in PHOTOGRAPHS]
    expected = _logits(model, images)
    difference, cost, half = export(model, out, PHOTOGRAPHS, fp16=True)
    assert difference <= 1e-4
    assert half is not None
    assert 1e-6 < half < 0.01
    assert cost == RoundingCost("fp16", len(PHOTOGRAPHS), 0, 0, 0, 0)
    found = _logits(load_onnx(out), images)
    assert found.dtype == torch.float32
    assert found.argmax(dim=1).equal(expected.argmax(dim=1))
    assert float((found - expected).abs().max() / expected.abs().max()) == pytest.approx(half, rel=0.5)
    proto = onnx.load(out)
    assert {entry.key: entry.value for entry in proto.metadata_props}["weights"] == "fp16"
    types = [tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) > 1]
    assert onnx.TensorProto.FLOAT not in types
    assert types.count(onnx.TensorProto.FLOAT16) > 5


def test_fp16_that_says_something_else_is_refused_and_leaves_nothing(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "HALF_PRECISION_TOLERANCE", 1e-7)
    with pytest.raises(UserError, match=r"the logits in fp16 differ from PyTorch's by .* nothing was written"):
        export(_random(vit), tmp_path / "model.onnx", [], fp16=True)
    assert not list(tmp_path.iterdir())


def test_the_cost_of_int8_in_words() -> None:
    assert str(RoundingCost("int8", 10, 1, 0, 0, 0)) == "of 10 images, int8 gives 1 another class than fp32"
    assert "accuracy on the 8 in folders of classes: fp32 87.50%, int8 75.00%" in str(
        RoundingCost("int8", 10, 1, 8, 7, 6)
    )
