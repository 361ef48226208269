"""A classifier from one ONNX file: ONNX Runtime instead of torch's model, labels and processor out of the metadata."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from lora_dist import extras
from lora_dist.errors import UserError
from lora_dist.model.classifier import Classifier

INPUT, OUTPUT = "pixel_values", "logits"
LABELS = "labels"
"""Key of the metadata: class names in order, as JSON."""
PREPROCESSOR = "preprocessor_config"
"""Key of the metadata: what `preprocessor_config.json` holds in a model of transformers."""


class OnnxModel(nn.Module):
    """Calls ONNX Runtime, on the CPU, the way a `transformers` classifier is called."""

    session: Any

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, pixel_values: Tensor) -> Any:
        """Float32 [B, 3, H, W] to an object with `logits` [B, classes]."""
        (logits,) = self.session.run([OUTPUT], {INPUT: pixel_values.numpy()})
        return SimpleNamespace(logits=torch.from_numpy(logits))


def load_onnx(path: Path) -> Classifier:
    """Loads a file that `onnx_export` wrote. It runs on as many threads as torch has.

    Raises:
        UserError: no such file, not ONNX, not one of ours, or ONNX Runtime is not installed.
    """
    extras.require("onnx", "--onnx", "onnxruntime")
    import onnxruntime

    if not path.is_file():
        raise UserError(f"--onnx {path}: no such file to run; with an --adapter or --model it is written")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime has an exception of its own for each way of failing, and no class above them.
        raise UserError(f"--onnx {path}: ONNX Runtime cannot load it: {error}") from error
    metadata = session.get_modelmeta().custom_metadata_map
    try:
        labels, config = json.loads(metadata[LABELS]), json.loads(metadata[PREPROCESSOR])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--onnx {path}: its metadata do not say the labels and the preprocessing, so it was not written by "
            f"lora_dist ({error})"
        ) from error
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"--onnx {path}: the preprocessing in its metadata cannot be used: {error}") from error
    return Classifier(OnnxModel(session).eval(), processor, labels)
