"""What a run hands over: the adapter with its labels, processor, card and base; written whole, read strictly.

The directory is a PEFT adapter that `PeftModel.from_pretrained` loads. Beside the adapter stand `config.json` (the
architecture and the label map), `preprocessor_config.json`, `base_model.json` (name, revision and fingerprint of
the base) and `README.md`. A run with `--tuning full` hands over a whole `transformers` model instead.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from lora_dist import adapters
from lora_dist.errors import UserError
from lora_dist.files import whole_directory
from lora_dist.model import Base, load_base
from lora_dist.transforms import ImageTransforms

BASE_MODEL = "base_model.json"
TOLERANCE = 1e-3
"""Relative difference of logits up to which two ways of computing them on one device or two count as equal."""
HALF_PRECISION_TOLERANCE = 5e-2
"""The same where one of them is in fp16 or bf16."""


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify.

    Attributes:
        model: in evaluation mode, fp32; with its adapter, or whole.
        processor: its image processor.
        labels: class names in order.
    """

    model: nn.Module
    processor: Any
    labels: list[str]


def write_adapter(directory: Path, model: nn.Module, base: Base, card: str, initial: Path | None = None) -> None:
    """Writes the bundle of an adapter; a bundle that stands there is replaced only when the new one is whole."""
    with whole_directory(directory) as aside:
        adapters.save_adapter(model, aside, initial)
        base.model.config.save_pretrained(aside)
        _write_labels(aside, base.model.config)
        base.processor.save_pretrained(aside)
        (aside / BASE_MODEL).write_text(json.dumps(base.identity(), indent=2) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(card, encoding="utf-8")


def write_model(directory: Path, model: Any, processor: Any, card: str) -> None:
    """Writes a whole `transformers` model with its processor and card, in the same way."""
    with whole_directory(directory) as aside:
        model.save_pretrained(aside)
        _write_labels(aside, model.config)
        processor.save_pretrained(aside)
        (aside / "README.md").write_text(card, encoding="utf-8")


def load_classifier(directory: Path, base_model: str | None = None, trust_remote_code: bool = False) -> Classifier:
    """Loads what a run handed over: a bundle with an adapter, or a whole model.

    Args:
        directory: of the bundle or model.
        base_model: where the base is now, if not where the bundle says.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: part of the bundle is missing, or the base is another one than the adapter was trained on.
    """
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}")
    if not (directory / adapters.ADAPTER_CONFIG).is_file():
        labels = read_labels(directory, trust_remote_code)
        whole = load_base(str(directory), labels, trust_remote_code=trust_remote_code)
        if whole.missing:
            raise UserError(
                f"{directory} is no whole {type(whole.model).__name__}: its weights lack {', '.join(whole.missing[:5])}"
            )
        return Classifier(whole.model.eval(), whole.processor, labels)
    labels = read_labels(directory, trust_remote_code)
    identity = _read_identity(directory / BASE_MODEL)
    name = base_model or identity["model_name_or_path"]
    revision = None if base_model else identity["revision"]
    base = load_base(name, labels, revision=revision, trust_remote_code=trust_remote_code)
    if base.fingerprint != identity["fingerprint"]:
        raise UserError(
            f"{name} is not the base that the adapter in {directory} was trained on: the fingerprint of its weights is "
            f"{base.fingerprint}, and that of {identity['model_name_or_path']} was {identity['fingerprint']}"
        )
    try:
        processor = AutoImageProcessor.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}/preprocessor_config.json is missing or damaged: {error}") from error
    return Classifier(adapters.load_adapter(base.model, directory), processor, labels)


def read_labels(directory: Path, trust_remote_code: bool = False) -> list[str]:
    """Class names in order, from the label map of a bundle or model.

    Args:
        directory: of the bundle or model.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: there is none.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json, and so no label map: it was not written by lora_dist")
    try:
        # `transformers` makes up LABEL_0, LABEL_1 … where there is no label map.
        if "id2label" not in json.loads((directory / "config.json").read_text(encoding="utf-8")):
            raise UserError(f"{directory}/config.json has no label map (id2label), so nobody knows the classes")
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{directory}/config.json is damaged: {error}") from error
    names: dict[int, str] = config.id2label or {}
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"the label map in {directory}/config.json is not numbered from 0 on")
    return [names[place] for place in range(len(names))]


def _write_labels(directory: Path, config: Any) -> None:
    """Puts the label map into `config.json`, where `transformers` leaves it out if it is LABEL_0, LABEL_1."""
    path = directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content |= {"id2label": config.id2label, "label2id": config.label2id}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_identity(path: Path) -> dict[str, Any]:
    """What `Base.identity` wrote."""
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        return {key: identity[key] for key in ("model_name_or_path", "revision", "fingerprint")}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing, so the adapter's base is not known") from error
    except KeyError as error:
        raise UserError(f"{path} is damaged: it does not say {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def require_same_logits(
    directory: Path,
    images: Sequence[Image.Image],
    expected: Tensor,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
) -> None:
    """Checks that what was written gives the logits of the model it was written from, on real images.

    Args:
        directory: of the bundle or model.
        images: to classify.
        expected: logits [B, classes] of the model in memory.
        tolerance: largest difference, relative to the largest logit.
        trust_remote_code: run code that comes with the model.

    Raises:
        RuntimeError: it does not; a file that is silently wrong would cost the whole run (peft#577).
    """
    read = load_classifier(directory, trust_remote_code=trust_remote_code)
    with torch.inference_mode():
        actual = read.model(pixel_values=ImageTransforms(read.processor).batch(images)).logits.float()
    difference = relative_difference(actual, expected)
    if not difference <= tolerance:
        raise RuntimeError(f"{directory} was written but gives other logits when read: relative error {difference:.1e}")


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
