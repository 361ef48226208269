"""What an adapter from elsewhere leaves unsaid: its base, its number of classes and their names."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification

from lora_dist import demo, hub_client
from lora_dist.errors import UserError
from lora_dist.model import adapter_io
from lora_dist.model.adapter_io import AdapterFiles
from lora_dist.model.backbone import cannot_load

logger = logging.getLogger(__name__)


def recorded_base(directory: Path) -> tuple[str, str | None]:
    """Name and revision of the base that PEFT wrote down.

    Raises:
        UserError: it wrote none.
    """
    config = adapter_io.read_config(directory)
    name = config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{directory}/adapter_config.json does not say what the base is; name it with --base_model")
    return str(name), config.get("revision")


def labels_of(
    directory: Path, base: str, revision: str | None, given: Sequence[str] | None, trust_remote_code: bool
) -> list[str]:
    """Class names for an adapter without a label map: those given, else LABEL_0, LABEL_1 … with a warning.

    Args:
        directory: of the adapter.
        base: name of its base.
        revision: of the base on the Hub.
        given: by the user.
        trust_remote_code: run code that comes with the base.

    Raises:
        UserError: the names given are more or fewer than the adapter's head has classes.
    """
    base = demo.local_path(base)
    try:
        with hub_client.reading(f"the configuration of the base model {base}", f"`hf download {base}`"):
            config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise cannot_load(base, error) from error
    count = class_count(adapter_io.read(directory), config, trust_remote_code)
    if count is None:
        # The adapter brings no head: it was trained on that of a base that is fine-tuned already.
        labels = [config.id2label[index] for index in range(config.num_labels)]
    else:
        labels = [f"LABEL_{index}" for index in range(count)]
    if given is None:
        if count is not None:
            logger.warning(
                "%s has no label map: the classes are called LABEL_0 … LABEL_%d. Name a file with --labels.",
                directory,
                count - 1,
            )
        return labels
    if len(given) != len(labels):
        raise UserError(f"--labels names {len(given)} classes, and the adapter in {directory} has {len(labels)}")
    return list(given)


def class_count(adapter: AdapterFiles, config: Any, trust_remote_code: bool) -> int | None:
    """Classes of the head that an adapter brings, or None where it brings none.

    Which tensors have a row for each class is seen from two models of different numbers of classes, made without
    memory for their weights.

    Args:
        adapter: as read.
        config: of its base.
        trust_remote_code: run code that comes with the base.

    Raises:
        UserError: it has several heads, of different numbers of classes.
    """
    config = copy.deepcopy(config)
    shapes: list[dict[str, torch.Size]] = []
    for count in (2, 3):
        config.num_labels = count
        with torch.device("meta"):
            model: Any = AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    counts = {
        len(adapter.state[name])
        for name, shape in shapes[0].items()
        if shape != shapes[1][name] and name in adapter.state
    }
    if len(counts) > 1:
        raise UserError(
            f"the adapter in {adapter.directory} has heads of different numbers of classes: {sorted(counts)}"
        )
    return counts.pop() if counts else None


def read_labels_file(path: str) -> list[str]:
    """Class names from a text file, one a line, in order; the first is class 0.

    Raises:
        UserError: it cannot be read, or a name stands there twice.
    """
    try:
        labels = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels {path}: {error}") from error
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice or not labels:
        raise UserError(f"--labels {path}: " + (f"twice there: {', '.join(twice)}" if twice else "the file is empty"))
    return labels
