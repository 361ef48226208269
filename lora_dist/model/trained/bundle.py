"""Reads and writes the result of a run: an adapter with the identity of its base, labels, processor and model card.

The directory is a PEFT adapter that `PeftModel.from_pretrained` loads, with `config.json` (architecture and label map),
`preprocessor_config.json`, `base_model.json` (name, revision and fingerprint of the base), `conversion.json` (how
images become 8-bit RGB), `calibration.json` (temperature, if one was fitted), `thresholds.json` (only of several labels
per image) and `README.md` with its pictures. A run with `--tuning full` writes a whole `transformers` model instead.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import nn

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base
from lora_dist.model.base.head import EMPTY_FINGERPRINT
from lora_dist.model.base.shared_weights import save_model
from lora_dist.model.lora import adapter_io, adapters
from lora_dist.model.lora.adapter_io import AdapterFiles
from lora_dist.model.trained import infer_metadata
from lora_dist.model.trained.decision import MULTI_LABEL, Decision, MostLikely, decision_of
from lora_dist.model.trained.temperature import UNCALIBRATED, Calibration
from lora_dist.storage.atomic import whole_directory

logger = logging.getLogger(__name__)
BASE_MODEL = "base_model.json"
CONVERSION = "conversion.json"
THRESHOLDS = "thresholds.json"
CALIBRATION = "calibration.json"
IDENTITY = ("model_name_or_path", "revision", "fingerprint")
Record = TypeVar("Record")


@dataclass(frozen=True)
class Records:
    """The records of a bundle besides its weights: how to prepare images, and how to turn logits into an answer."""

    conversion: Conversion = AS_TRANSFORMERS
    calibration: Calibration = UNCALIBRATED
    decision: Decision = field(default_factory=MostLikely)


NO_RECORDS = Records()
NO_PICTURES: Mapping[str, Image.Image] = {}


def write_adapter(
    directory: Path,
    model: nn.Module,
    base: Base,
    card: str,
    initial: Path | None = None,
    records: Records = NO_RECORDS,
    pictures: Mapping[str, Image.Image] = NO_PICTURES,
) -> None:
    """Writes an adapter bundle; an existing one is replaced when the new one is complete."""
    with whole_directory(directory) as temporary:
        adapters.save_adapter(model, temporary, initial)
        write_metadata(temporary, base.model.config, base.processor, card, records, pictures, base.identity())


def write_model(
    directory: Path,
    model: Any,
    processor: Any,
    card: str,
    records: Records = NO_RECORDS,
    pictures: Mapping[str, Image.Image] = NO_PICTURES,
) -> None:
    """Writes a whole `transformers` model; an existing one is replaced when the new one is complete."""
    with whole_directory(directory) as temporary:
        save_model(model, temporary)
        write_metadata(temporary, model.config, processor, card, records, pictures)


def write_metadata(
    directory: Path,
    config: Any,
    processor: Any,
    card: str,
    records: Records,
    pictures: Mapping[str, Image.Image] = NO_PICTURES,
    base: dict[str, str | None] | None = None,
) -> None:
    """Writes config, label map, processor, records and model card with its pictures, by file name, into an existing
    directory; for an adapter, also its base."""
    decision = records.decision
    config.save_pretrained(directory)
    path = directory / "config.json"
    # `transformers` leaves the label map out if it is LABEL_0, LABEL_1.
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    # The configuration of a base with several adapters has the problem type of the first one.
    own = {**labels, "problem_type": decision.problem_type}
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | own)
    processor.save_pretrained(directory)
    _write_json(directory / CONVERSION, records.conversion.record())
    if (thresholds := decision.record([config.id2label[index] for index in range(len(config.id2label))])) is not None:
        _write_json(directory / THRESHOLDS, thresholds)
    if base is not None:
        _write_json(directory / BASE_MODEL, base)
    if records.calibration != UNCALIBRATED:
        _write_json(directory / CALIBRATION, records.calibration.record())
    for name, picture in pictures.items():
        picture.save(directory / name)
    (directory / "README.md").write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class AdapterBundle:
    """An adapter with its base and classes.

    Attributes:
        files: configuration and weights.
        base: current name or path of the base.
        trained_base: name or path of the base at training time.
        revision: commit of the base on the Hub.
        fingerprint: of the base's weights, if recorded.
        pooling: features of a linear head on the backbone, if recorded (see `classifier_config`).
        image_size: height and width of the images, if they are not those of the base.
        labels: class names in order.
        trust_remote_code: run code that comes with the processor.
        conversion: how images became 8-bit RGB in training.
        calibration: of the logits.
        decision: turns logits into an answer.
    """

    files: AdapterFiles
    base: str
    trained_base: str
    revision: str | None
    fingerprint: str | None
    pooling: str | None
    image_size: tuple[int, int] | None
    labels: list[str]
    trust_remote_code: bool
    conversion: Conversion
    calibration: Calibration
    decision: Decision


def read_bundle(
    directory: Path, base_model: str | None, trust_remote_code: bool, labels: Sequence[str] | None
) -> AdapterBundle:
    """Reads an adapter, and infers its base and classes if another program wrote it. See `load_classifier`.

    Raises:
        UserError: a file is missing or damaged, or `labels` differs from the label map.
    """
    files = adapter_io.read(directory)
    fingerprint = pooling = image_size = None
    if is_ours := (directory / BASE_MODEL).is_file():
        trained_base, revision, fingerprint, pooling, image_size = _read_identity(directory / BASE_MODEL)
        if fingerprint == EMPTY_FINGERPRINT:
            fingerprint = None
            logger.warning("%s has no fingerprint of the backbone: cannot check its base", directory / BASE_MODEL)
    else:
        trained_base, revision = (base_model, None) if base_model else infer_metadata.recorded_base(files)
        logger.warning("%s has no %s: cannot check that %s is its base", directory, BASE_MODEL, trained_base)
    base, revision = (base_model, None) if base_model else (trained_base, revision)
    if label_map(directory) is not None:
        names = read_labels(directory)
        if labels is not None and names != list(labels):
            raise UserError(f"--class_names differs from the label map in {directory}/config.json; leave it out")
    elif is_ours and labels is None:
        raise UserError(f"{directory}/config.json has no label map (id2label); name a file with --class_names")
    else:
        names = infer_metadata.labels_of(files, base, revision, labels, trust_remote_code)
    return AdapterBundle(
        files,
        base,
        trained_base,
        revision,
        fingerprint,
        pooling,
        image_size,
        names,
        trust_remote_code,
        read_conversion(directory),
        read_calibration(directory),
        read_decision(directory, names),
    )


def read_conversion(directory: Path) -> Conversion:
    """Reads how images became 8-bit RGB in training; without a record, as `transformers` does it.

    Raises:
        UserError: the record is damaged.
    """
    return _read_record(directory / CONVERSION, Conversion.of, AS_TRANSFORMERS)


def read_calibration(directory: Path) -> Calibration:
    """Reads the temperature of a bundle or model, which is 1 without a record.

    Raises:
        UserError: the record is damaged.
    """
    return _read_record(directory / CALIBRATION, Calibration.of, UNCALIBRATED)


def _read_record(path: Path, parse: Callable[[Any], Record], missing: Record) -> Record:
    """Reads a JSON object with a function that raises `ValueError`, `TypeError` or `AttributeError` for a wrong one."""
    if not path.is_file():
        return missing
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_labels(directory: Path) -> list[str]:
    """Reads the class names of a bundle or model, in order.

    Raises:
        UserError: there is no label map, or it is damaged.
    """
    path, found = directory / "config.json", label_map(directory)
    # `transformers` would make up LABEL_0, LABEL_1.
    if found is None:
        raise UserError(f"{path} has no label map (id2label)")
    try:
        names = {int(number): str(label) for number, label in found.items()}
    except (AttributeError, ValueError) as error:
        raise UserError(
            f'{path} is damaged: its label map (id2label) does not map numbers to names: write it as {{"0": "first '
            f'class", "1": "second class", …}}'
        ) from error
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"the label map in {path} is not numbered from 0")
    return [names[index] for index in range(len(names))]


def label_map(directory: Path) -> Any:
    """Returns `id2label` of `config.json`, or None where either is missing.

    Raises:
        UserError: the file is damaged.
    """
    return _entry(directory / "config.json", "id2label")


def read_decision(directory: Path, labels: Sequence[str]) -> Decision:
    """Reads the problem type of a bundle or model, and the thresholds of several labels.

    Raises:
        UserError: a file is damaged, or has thresholds of other labels, or every image would get the same class.
    """
    path, problem_type = directory / THRESHOLDS, _entry(directory / "config.json", "problem_type")
    record = _read_record(path, lambda content: content, None)
    if len(labels) == 1 and problem_type != MULTI_LABEL:
        raise UserError(
            f"{directory} has a single class, {labels[0]}, which every image would get. If its output is the logit of "
            f'that class, as of a model with a sigmoid, set "problem_type": "{MULTI_LABEL}" in its config.json'
        )
    try:
        return decision_of(problem_type, record, labels)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _entry(path: Path, name: str) -> Any:
    """Returns an entry of a JSON file, or None where either is missing."""
    return _read_record(path, lambda content: content.get(name), None)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_identity(path: Path) -> tuple[Any, ...]:
    """Name, revision, fingerprint, pooling and image size that `Base.identity` gave."""
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        size = identity.get("image_size")
        image_size = None if size is None else (int(size[0]), int(size[1]))
        return *(identity[key] for key in IDENTITY), identity.get("pooling"), image_size
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
