"""Merges an adapter and writes one ONNX file, with labels and preprocessing in its metadata; checks its logits."""

import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_dist import extras
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.deployment.classify import Inference, classify
from lora_dist.deployment.destinations import require_free_file
from lora_dist.deployment.export.checks import check_images, logits
from lora_dist.deployment.export.onnx_model import (
    CONVERSION,
    INPUT,
    LABELS,
    OUTPUT,
    PREPROCESSOR,
    PROBLEM_TYPE,
    THRESHOLDS,
    WEIGHTS,
    OnnxModel,
    load_onnx,
)
from lora_dist.deployment.export.preprocessing import describe
from lora_dist.errors import UserError, first_line
from lora_dist.metrics.predictions import class_folder, common_folder
from lora_dist.model.lora import adapters
from lora_dist.model.trained.classifier import Classifier
from lora_dist.model.trained.decision import MULTI_LABEL
from lora_dist.model.trained.parity import HALF_PRECISION_TOLERANCE, relative_difference
from lora_dist.storage.atomic import replace_file

TOLERANCE = 1e-4
"""Largest difference between the logits of ONNX Runtime and PyTorch, relative to the largest logit."""
MAX_BYTES = 2**31
"""Largest size of a protocol buffer, and therefore of one ONNX file."""
QUANTIZED = ["MatMul", "Gemm"]
"""Quantised operators. In ONNX Runtime, int8 convolutions are slower than fp32."""


class RoundingCost(NamedTuple):
    """The effect of rounding: counts of images, of changed answers, and of right answers for images in class folders.

    `weights` names the rounded type. `answer` is "class", or "set of labels", for which there are no class folders.
    """

    weights: str
    images: int
    changed: int
    labelled: int
    right_before: int
    right_after: int
    answer: str = "class"

    def __str__(self) -> str:
        text = f"of {self.images} images, {self.weights} gives {self.changed} another {self.answer} than fp32"
        if self.labelled:
            before, after = self.right_before / self.labelled, self.right_after / self.labelled
            text += f"; accuracy on the {self.labelled} in folders of classes: fp32 {before:.2%}, "
            text += f"{self.weights} {after:.2%}"
        return text


class Exported(NamedTuple):
    """Relative differences of logits in fp32 and in fp16, and the effect of rounding if it was measured."""

    logits: float
    cost: RoundingCost | None
    fp16: float | None = None


def export(
    classifier: Classifier,
    out: Path,
    files: Sequence[str],
    int8: bool = False,
    fp16: bool = False,
    batch_size: int | None = None,
) -> Exported:
    """Writes the classifier as an ONNX file, after checking its logits.

    Args:
        classifier: whole, or with an adapter, which is merged in place.
        out: new file.
        files: images to compare on; packaged photographs if none is readable.
        int8: quantise the weights of linear layers to 8 bits, and their inputs dynamically.
        fp16: round the weights to fp16, and compute in fp16 where ONNX Runtime can; inputs and logits stay fp32.
        batch_size: of the count of predictions that rounding changes, as in `classify`. It matters for int8, which
            scales the inputs of a layer by the largest of a batch.

    Raises:
        UserError: the logits differ by more than `TOLERANCE`, or in fp16 by more than `HALF_PRECISION_TOLERANCE`, the
            model cannot be exported, `out` exists, or a package is missing.
    """
    require_packages()
    import onnx

    require_free_file(out, "onnx")
    if type(classifier.processor).__module__.startswith("transformers_modules."):
        raise UserError(
            f"--onnx {out}: the image processor {type(classifier.processor).__name__} has code of its own, which an "
            f"ONNX file does not contain; write the model with --merge_to instead"
        )
    transforms = classifier.transforms()
    pixels = transforms.batch(check_images(files, transforms))
    temperature = classifier.calibration.temperature
    expected = logits(classifier.model, pixels) / temperature
    proto = _to_onnx(classifier.model, temperature, pixels[:1], out)
    onnx.helper.set_model_props(proto, _metadata(classifier, transforms))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".writing-") as directory:
        file = Path(directory) / out.name
        onnx.save(proto, file)
        exact = load_onnx(file)
        assert isinstance(exact.model, OnnxModel)
        images = exact.model.session.get_inputs()[0].shape[0]
        if isinstance(images, int):
            raise UserError(f"--onnx {out}: this model can be exported only for a batch of {images}")
        difference = _difference(exact, pixels, expected)
        _require(difference, TOLERANCE, out, f"on {len(pixels)} images the logits of ONNX Runtime")
        cost = half = None
        if int8 or fp16:
            (_quantize if int8 else _halve)(proto, file)
            rounded = load_onnx(file)
            if fp16:
                half = _difference(rounded, pixels, expected)
                _require(half, HALF_PRECISION_TOLERANCE, out, f"on {len(pixels)} images the logits in fp16")
            cost = _cost("int8" if int8 else "fp16", exact, rounded, files, batch_size) if files else None
        replace_file(out, file.read_bytes())
    return Exported(difference, cost, half)


def _metadata(classifier: Classifier, transforms: ImageTransforms) -> dict[str, str]:
    """Returns what a user of the file has to know of the model."""
    calibration = classifier.calibration
    total = calibration.temperature * calibration.folded
    return {
        LABELS: json.dumps(classifier.labels, ensure_ascii=False),
        PREPROCESSOR: classifier.processor.to_json_string(),
        CONVERSION: json.dumps(classifier.conversion.record()),
        "temperature": f"{total:.6g}, by which the logits are divided already",
        PROBLEM_TYPE: classifier.decision.problem_type,
        THRESHOLDS: json.dumps(classifier.decision.record(classifier.labels), ensure_ascii=False),
        "preprocessing": describe(transforms),
        WEIGHTS: "fp32",
    }


def _require(difference: float, largest: float, out: Path, what: str) -> None:
    if not difference <= largest:
        raise UserError(
            f"--onnx {out}: {what} differ from PyTorch's by {difference:.1e} of the largest, more than {largest:.0e}; "
            f"nothing was written"
        )


def require_packages() -> None:
    """Raises a `UserError` if a package for writing ONNX files is missing."""
    extras.require("onnx", "--onnx", "onnx", "onnxscript", "onnxruntime")


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits = self.model(pixel_values=pixel_values).logits
        return logits if self.temperature == 1 else logits / self.temperature


def _to_onnx(model: nn.Module, temperature: float, example: Tensor, out: Path) -> Any:
    """Merges and converts a model to an ONNX `ModelProto`, which divides its logits by the temperature."""
    merged = _Logits(adapters.merge(model) if adapters.is_adapted(model) else model, temperature).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in merged.parameters())
    if size > MAX_BYTES:
        raise UserError(f"--onnx {out}: {size / 2**30:.1f} GB of weights; an ONNX file can have 2 GB")
    for module in merged.modules():
        # timm's name for attention in one operator, which torch.onnx has for inputs of four dimensions only.
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # type: ignore[assignment]
    try:
        # With gradients, Swin's attention cannot be decomposed into ONNX operators.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                merged,
                # torch.export specialises a batch of one.
                (example.expand(2, -1, -1, -1).contiguous(),),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"--onnx {out}: torch.onnx cannot export {type(merged.model).__name__}: {reason}") from error
    assert program is not None
    return program.model_proto


def _difference(actual: Classifier, pixels: Tensor, expected: Tensor) -> float:
    """Difference of logits, for all images in one batch and one by one."""
    whole = logits(actual.model, pixels)
    single = torch.cat([logits(actual.model, pixels[row : row + 1]) for row in range(len(pixels))])
    return max(relative_difference(whole, expected), relative_difference(single, expected))


def _quantize(proto: Any, out: Path) -> None:
    """Writes the file with 8-bit weights, unsigned: signed ones saturate on CPUs without VNNI instructions."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Some releases transpose weights in place, and then refuse the shapes recorded by the exporter.
    del proto.graph.value_info[:]
    # It advises on the root logger to optimise the file first.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            proto, out, op_types_to_quantize=QUANTIZED, per_channel=True, weight_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)
    _save(onnx.load(out), proto, "int8, dynamic", out)


def _halve(proto: Any, out: Path) -> None:
    """Writes the file in fp16, except for operators that lose too much in it; its inputs and outputs stay fp32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    # The types recorded by the exporter are those of fp32.
    del proto.graph.value_info[:]
    _save(convert_float_to_float16(proto, keep_io_types=True), proto, "fp16", out)


def _save(rounded: Any, proto: Any, weights: str, out: Path) -> None:
    """Writes a rounded model with the metadata of the exact one."""
    import onnx

    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(rounded, metadata | {WEIGHTS: weights})
    onnx.save(rounded, out)


def _cost(
    weights: str, exact: Classifier, rounded: Classifier, files: Sequence[str], batch_size: int | None
) -> RoundingCost:
    inference = Inference(torch.device("cpu"), batch_size)
    images = changed = labelled = right_before = right_after = 0
    multi_label = exact.decision.problem_type == MULTI_LABEL
    names = frozenset() if multi_label else frozenset(exact.labels)
    root = common_folder(files)
    rows = (classify(one, files, inference, top_k=1) for one in (exact, rounded))
    for before, after in zip(*rows, strict=True):
        if before.error is not None:
            continue
        answer_before, answer_after = ([name for name, _ in row.answer] for row in (before, after))
        folder = class_folder(before.path, names, root)
        images += 1
        changed += set(answer_before) != set(answer_after)
        labelled += folder is not None
        right_before += answer_before == [folder]
        right_after += answer_after == [folder]
    answer = "set of labels" if multi_label else "class"
    return RoundingCost(weights, images, changed, labelled, right_before, right_after, answer)
