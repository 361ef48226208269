"""Loads a classifier from an ONNX file that `onnx_export` wrote, and runs it with ONNX Runtime."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from lora_dist import extras
from lora_dist.data.pixels.conversion import Conversion
from lora_dist.errors import UserError
from lora_dist.model.trained.classifier import Classifier
from lora_dist.model.trained.decision import decision_of

INPUT, OUTPUT = "pixel_values", "logits"
LABELS = "labels"
"""Metadata key of the class names in order, as JSON."""
PREPROCESSOR = "preprocessor_config"
"""Metadata key of the content of `preprocessor_config.json`."""
CONVERSION = "conversion"
"""Metadata key of the content of `conversion.json`."""
PROBLEM_TYPE = "problem_type"
"""Metadata key of the problem type of `transformers`; files of older releases have none."""
THRESHOLDS = "thresholds"
"""Metadata key of the content of `thresholds.json`, which is `null` for a model of one class per image."""

WEIGHTS = "weights"
"""Metadata key of the precision of the weights, followed by details: `fp32`, `fp16` or `int8, dynamic`."""


class OnnxModel(nn.Module):
    """Runs ONNX Runtime on the CPU with the interface of a `transformers` classifier.

    Attributes:
        precision: of the weights, such as `int8`.
    """

    session: Any

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.precision = session.get_modelmeta().custom_metadata_map.get(WEIGHTS, "fp32").partition(",")[0]

    def forward(self, pixel_values: Tensor) -> Any:
        """Takes float32 [B, 3, H, W], returns an object with `logits` [B, classes]."""
        (logits,) = self.session.run([OUTPUT], {INPUT: pixel_values.numpy()})
        return SimpleNamespace(logits=torch.from_numpy(logits))


def load_onnx(path: Path) -> Classifier:
    """Loads an ONNX file; it runs on as many threads as torch.

    Raises:
        UserError: the file is missing, damaged or has no metadata of lora_dist, or ONNX Runtime is not installed.
    """
    extras.require("onnx", "--onnx", "onnxruntime")
    import onnxruntime

    if not path.is_file():
        raise UserError(f"--onnx {path}: no such file; pass an --adapter or --model to write it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime's exceptions have no common base class.
        raise UserError(f"--onnx {path}: ONNX Runtime cannot load it: {error}") from error
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        labels, config = json.loads(metadata[LABELS]), json.loads(metadata[PREPROCESSOR])
        conversion = Conversion.of(json.loads(metadata.get(CONVERSION, "{}")))
        decision = decision_of(metadata.get(PROBLEM_TYPE), json.loads(metadata.get(THRESHOLDS, "null")), labels)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--onnx {path}: its metadata lack labels or preprocessing, so it was not written by lora_dist ({error})"
        ) from error
    with tempfile.TemporaryDirectory() as directory:
        name = "preprocessor_config.json"
        if "data_config" in config:
            # timm's processor reads the configuration of its model.
            name, config = (
                "config.json",
                {"model_type": "timm_wrapper", "pretrained_cfg": config["data_config"], **config},
            )
        (Path(directory) / name).write_text(json.dumps(config), encoding="utf-8")
        try:
            processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"--onnx {path}: invalid preprocessing in its metadata: {error}") from error
    return Classifier(OnnxModel(session).eval(), processor, labels, conversion=conversion, decision=decision)
