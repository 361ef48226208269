"""A classifier to one ONNX file: merged, for batches of any size, with labels and preprocessing inside, and checked."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from lora_dist import extras
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.classify import classify
from lora_dist.deployment.export.destinations import require_free_file
from lora_dist.deployment.export.merge import check_images, logits
from lora_dist.deployment.export.onnx_model import INPUT, LABELS, OUTPUT, PREPROCESSOR, OnnxModel, load_onnx
from lora_dist.errors import UserError
from lora_dist.model import adapters
from lora_dist.model.classifier import Classifier
from lora_dist.model.parity import relative_difference

TOLERANCE = 1e-4
"""Largest difference between the logits of ONNX Runtime and of PyTorch, relative to the largest logit."""
LARGEST = 2**31
"""Bytes of weights that one ONNX file, which is a protocol buffer, can hold."""
QUANTIZED = ["MatMul", "Gemm"]
"""Operators that int8 is for. In ONNX Runtime a convolution in int8 is slower than in fp32."""


class Int8Cost(NamedTuple):
    """What int8 changes, counted on images.

    Attributes:
        images: that could be read.
        changed: of these, those whose class is another one than in fp32.
        labelled: of these, those in a folder that is named as a class.
        right_before: of the labelled, those classified as their folder says in fp32.
        right_after: the same in int8.
    """

    images: int
    changed: int
    labelled: int
    right_before: int
    right_after: int

    def __str__(self) -> str:
        text = f"of {self.images} images, int8 gives {self.changed} another class than fp32"
        if self.labelled:
            before, after = self.right_before / self.labelled, self.right_after / self.labelled
            text += f"; accuracy on the {self.labelled} in folders of classes: fp32 {before:.2%}, int8 {after:.2%}"
        return text


class Exported(NamedTuple):
    """How far what was written is from the model it was written from.

    Attributes:
        logits: largest difference in fp32, before anything is quantised, relative to the largest logit.
        int8: what quantising changes; None where nothing was quantised, or there were no files to count on.
    """

    logits: float
    int8: Int8Cost | None


def export(classifier: Classifier, out: Path, files: Sequence[str], int8: bool = False) -> Exported:
    """Writes the classifier as an ONNX file, which is there only when it has been checked.

    Args:
        classifier: with an adapter, which is merged and so used up, or whole.
        out: file to write; must not exist.
        files: images to compare on; for logits the first that can be read, or else packaged photographs.
        int8: quantise the weights of linear layers to 8 bits, and their inputs as they come.

    Returns:
        The differences measured.

    Raises:
        UserError: the logits differ by more than `TOLERANCE`, the model cannot be exported, something stands at `out`,
            or a package is missing.
    """
    require_packages()
    import onnx

    require_free_file(out, "onnx")
    transforms = ImageTransforms(classifier.processor)
    pixels = transforms.batch(check_images(files))
    expected = logits(classifier.model, pixels)
    proto = _to_onnx(classifier.model, pixels[:1], out)
    metadata = {
        LABELS: json.dumps(classifier.labels, ensure_ascii=False),
        PREPROCESSOR: classifier.processor.to_json_string(),
        "preprocessing": describe(classifier.processor, transforms.height, transforms.width),
        "weights": "fp32",
    }
    onnx.helper.set_model_props(proto, metadata)
    with _whole_file(out) as aside:
        onnx.save(proto, aside)
        exact = load_onnx(aside)
        assert isinstance(exact.model, OnnxModel)
        images = exact.model.session.get_inputs()[0].shape[0]
        if isinstance(images, int):
            raise UserError(f"--onnx {out}: this model can be exported for a batch of {images} alone")
        difference = _difference(exact, pixels, expected)
        if not difference <= TOLERANCE:
            raise UserError(
                f"--onnx {out}: on {len(pixels)} images the logits of ONNX Runtime differ from PyTorch's by "
                f"{difference:.1e} of the largest, and {TOLERANCE:.0e} is allowed; nothing was written"
            )
        cost = None
        if int8:
            _quantize(proto, aside)
            cost = _int8_cost(exact, load_onnx(aside), files) if files else None
    return Exported(difference, cost)


def require_packages() -> None:
    """Raises a `UserError` where a package that writes ONNX files is missing."""
    extras.require("onnx", "--onnx", "onnx", "onnxscript", "onnxruntime")


class _Logits(nn.Module):
    """A tensor in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def _to_onnx(model: nn.Module, example: Tensor, out: Path) -> Any:
    """The merged model as an ONNX `ModelProto`."""
    merged = _Logits(adapters.merge(model) if adapters.is_adapted(model) else model).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in merged.parameters())
    if size > LARGEST:
        raise UserError(f"--onnx {out}: {size / 2**30:.1f} GB of weights, and an ONNX file holds 2 GB")
    try:
        # With gradients, the attention of Swin cannot be decomposed into operators of ONNX.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                merged,
                # Two images: a batch of one would be taken for a constant.
                (example.expand(2, -1, -1, -1).contiguous(),),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        # What it says itself is how to report a bug; the cause says what is wrong.
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"--onnx {out}: torch.onnx cannot export {type(merged.model).__name__}: {reason}") from error
    assert program is not None
    return program.model_proto


def _difference(actual: Classifier, pixels: Tensor, expected: Tensor) -> float:
    """Of logits, for all images at once and one by one: the number of images must not matter."""
    whole = logits(actual.model, pixels)
    single = torch.cat([logits(actual.model, pixels[row : row + 1]) for row in range(len(pixels))])
    return max(relative_difference(whole, expected), relative_difference(single, expected))


def _quantize(proto: Any, out: Path) -> None:
    """Rewrites the file with 8-bit weights.

    Weights and inputs are both unsigned: with signed weights, CPUs without VNNI instructions saturate at 16 bits, and
    the result would depend on the CPU.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Some releases turn a weight around under its old name, and then refuses the shape that the exporter noted.
    del proto.graph.value_info[:]
    # It warns, through the root logger, of optimisations that a checked file shall not undergo.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            proto, out, op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    written = onnx.load(out)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(written, metadata | {"weights": "int8, dynamic"})
    onnx.save(written, out)


def _int8_cost(exact: Classifier, quantized: Classifier, files: Sequence[str]) -> Int8Cost:
    settings: dict[str, Any] = {"top_k": 1, "batch_size": 8, "num_workers": None, "device": torch.device("cpu")}
    images = changed = labelled = right_before = right_after = 0
    names = set(exact.labels)
    rows = zip(classify(exact, files, **settings), classify(quantized, files, **settings), strict=True)
    for before, after in rows:
        if before.error is not None:
            continue
        (was, _), (is_, _) = before.top_k[0], after.top_k[0]
        folder = Path(before.path).parent.name
        images += 1
        changed += was != is_
        labelled += folder in names
        right_before += was == folder
        right_after += is_ == folder
    return Int8Cost(images, changed, labelled, right_before, right_after)


def describe(processor: Any, height: int, width: int) -> str:
    """The preprocessing in words, for who runs the file without this package.

    Args:
        processor: of the model.
        height: of the model's input, in pixels.
        width: the same.
    """
    settings = processor.to_dict()
    steps = ["decode to 8-bit RGB, turned upright as EXIF says"]
    size = dict(settings.get("size") or {})
    crop = dict(settings.get("crop_size") or {}) if settings.get("do_center_crop") else {}
    if settings.get("crop_pct") and size.get("shortest_edge", 384) < 384:
        # ConvNeXt's processor crops without saying so.
        crop, size = {"height": height, "width": width}, {"shortest_edge": int(height / settings["crop_pct"])}
    if settings.get("do_resize"):
        how = Image.Resampling(int(settings["resample"])).name.lower()
        edge = size.get("shortest_edge")
        to = f"its shorter side to {edge} pixels" if edge and crop else f"to {height} x {width} (height x width)"
        steps.append(f"resize {to}, {how} with antialiasing, as torchvision resizes 8-bit tensors")
    if crop:
        steps.append(f"cut the middle {height} x {width} out")
    if settings.get("do_rescale"):
        steps.append(f"multiply by {settings['rescale_factor']!r}")
    if settings.get("do_normalize"):
        mean, std = (list(settings[name]) for name in ("image_mean", "image_std"))
        steps.append(f"subtract the mean {mean} and divide by the standard deviation {std}, for red, green and blue")
    order = "blue, green, red" if settings.get("do_flip_channel_order") else "red, green, blue"
    steps.append(f"float32 of shape [batch, 3, {height}, {width}]: image, channel ({order}), row, column")
    return "; ".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


@contextmanager
def _whole_file(final: Path) -> Iterator[Path]:
    """A file to write, which becomes `final` at the end, or is removed after an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".writing-{final.name}")
    try:
        yield aside
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)
