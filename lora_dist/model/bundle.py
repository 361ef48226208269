"""What a run hands over: the adapter with its labels, processor, card and base; written whole, read strictly.

The directory is a PEFT adapter that `PeftModel.from_pretrained` loads. Beside the adapter stand `config.json` (the
architecture and the label map), `preprocessor_config.json`, `base_model.json` (name, revision and fingerprint of
the base) and `README.md`. A run with `--tuning full` hands over a whole `transformers` model instead.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_dist.errors import UserError
from lora_dist.model import adapters, infer_metadata
from lora_dist.model.backbone import Base
from lora_dist.storage.files import whole_directory

logger = logging.getLogger(__name__)
BASE_MODEL = "base_model.json"
IDENTITY = ("model_name_or_path", "revision", "fingerprint")


def write_adapter(directory: Path, model: nn.Module, base: Base, card: str, initial: Path | None = None) -> None:
    """Writes the bundle of an adapter; a bundle that stands there is replaced only when the new one is whole."""
    with whole_directory(directory) as aside:
        adapters.save_adapter(model, aside, initial)
        write_company(aside, base.model.config, base.processor, base.identity(), card)


def write_company(directory: Path, config: Any, processor: Any, identity: dict[str, str | None], card: str) -> None:
    """Writes what stands beside an adapter.

    Args:
        directory: must be there.
        config: of the base, with the label map.
        processor: of images.
        identity: of the base.
        card: content of the model card.
    """
    config.save_pretrained(directory)
    _write_labels(directory, config)
    processor.save_pretrained(directory)
    (directory / BASE_MODEL).write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_model(directory: Path, model: Any, processor: Any, card: str) -> None:
    """Writes a whole `transformers` model with its processor and card, in the same way."""
    with whole_directory(directory) as aside:
        write_model_files(aside, model, processor, card)


def write_model_files(directory: Path, model: Any, processor: Any, card: str) -> None:
    """Writes the same into a directory that is there."""
    model.save_pretrained(directory)
    _write_labels(directory, model.config)
    processor.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class Origin:
    """What an adapter belongs to.

    Attributes:
        base: name or path of its base.
        named: the same, where the adapter was trained.
        revision: of the base on the Hub.
        fingerprint: of the base's weights, where the adapter's directory says.
        labels: class names in order.
        trust_remote_code: run code that comes with the adapter, such as that of its processor.
    """

    base: str
    named: str
    revision: str | None
    fingerprint: str | None
    labels: list[str]
    trust_remote_code: bool


def read_origin(
    directory: Path, base_model: str | None, trust_remote_code: bool, labels: Sequence[str] | None
) -> Origin:
    """What an adapter says of its base and classes; of one from elsewhere, what can be found out.

    Args:
        directory: of the adapter.
        base_model: where the base is now, if not where the adapter says.
        trust_remote_code: run code that comes with the model.
        labels: class names of an adapter that has no label map.

    Raises:
        UserError: part of the bundle is missing or damaged, or there are two label maps.
    """
    fingerprint = None
    if is_bundle := (directory / BASE_MODEL).is_file():
        identity = _read_identity(directory / BASE_MODEL)
        named, revision, fingerprint = (identity[key] for key in IDENTITY)
    else:
        named, revision = (base_model, None) if base_model else infer_metadata.recorded_base(directory)
        logger.warning("%s has no %s: whether %s is its base cannot be checked", directory, BASE_MODEL, named)
    base, revision = (base_model, None) if base_model else (named, revision)
    if label_map(directory) is not None:
        own = read_labels(directory)
        if labels is not None and own != list(labels):
            raise UserError(f"--labels: {directory}/config.json has a label map of its own, and another one")
    elif is_bundle and labels is None:
        raise UserError(f"{directory}/config.json has no label map (id2label); name a file with --labels")
    else:
        own = infer_metadata.labels_of(directory, base, revision, labels, trust_remote_code)
    return Origin(base, named, revision, fingerprint, own, trust_remote_code)


def read_labels(directory: Path) -> list[str]:
    """Class names in order, from the label map of a bundle or model.

    Raises:
        UserError: there is none.
    """
    path, found = directory / "config.json", label_map(directory)
    # `transformers` makes up LABEL_0, LABEL_1 … where there is no label map.
    if found is None:
        raise UserError(f"{path} has no label map (id2label), so nobody knows the classes")
    try:
        names = {int(number): str(label) for number, label in found.items()}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged: its label map (id2label) is no map from numbers to names") from error
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"the label map in {path} is not numbered from 0 on")
    return [names[index] for index in range(len(names))]


def label_map(directory: Path) -> Any:
    """What `config.json` says of the labels; None where it says nothing or is not there.

    Raises:
        UserError: it is damaged.
    """
    path = directory / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("id2label") if path.is_file() else None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


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
        return {key: identity[key] for key in IDENTITY}
    except KeyError as error:
        raise UserError(f"{path} is damaged: it does not say {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
