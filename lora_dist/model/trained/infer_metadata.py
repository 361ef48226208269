"""Infers the base and the classes of an adapter that another program wrote."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageClassification

from lora_dist import demo, hub_client
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import read_config
from lora_dist.model.base.head import class_dimensions
from lora_dist.model.base.load_errors import cannot_load
from lora_dist.model.lora.adapter_io import AdapterFiles

logger = logging.getLogger(__name__)


def recorded_base(files: AdapterFiles) -> tuple[str, str | None]:
    """Returns the name and revision of the base in PEFT's configuration.

    Raises:
        UserError: it has none.
    """
    name = files.config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{files.directory}/adapter_config.json does not name the base; name it with --base_model")
    return str(name), files.config.get("revision")


def labels_of(
    files: AdapterFiles, base: str, revision: str | None, given: Sequence[str] | None, trust_remote_code: bool
) -> list[str]:
    """Returns class names for an adapter without a label map: the given ones, else LABEL_0, LABEL_1 … with a warning.

    Raises:
        UserError: the number of given names is not the number of classes of the adapter's head, or the base, whose head
            the adapter uses, does not number its classes from 0.
    """
    base = demo.local_path(base)
    try:
        with hub_client.reading(f"the configuration of the base model {base}", f"`hf download {base}`"):
            config = read_config(base, revision=revision, trust_remote_code=trust_remote_code)
        count = class_count(files, config, trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load(base, error) from error
    # An adapter without a head was trained with the head of a fine-tuned base.
    expected = config.num_labels if count is None else count
    if given is not None:
        if len(given) != expected:
            raise UserError(
                f"--class_names names {len(given)} classes, and the adapter in {files.directory} has {expected}"
            )
        return list(given)
    if count is None:
        if sorted(config.id2label) != [*range(expected)]:
            raise UserError(
                f"the label map (id2label) of the base {base} is not numbered from 0: name the classes with "
                f"--class_names"
            )
        return [str(config.id2label[index]) for index in range(expected)]
    logger.warning(
        "%s has no label map, so classes are named LABEL_0 …; pass names with --class_names", files.directory
    )
    return [f"LABEL_{index}" for index in range(count)]


def class_count(files: AdapterFiles, config: Any, trust_remote_code: bool) -> int | None:
    """Returns the number of classes of an adapter's head, or None if it has no head.

    Raises:
        UserError: the adapter has heads of different sizes.
    """
    dimensions = class_dimensions(
        config, partial(AutoModelForImageClassification.from_config, trust_remote_code=trust_remote_code)
    )
    counts = {files.state[name].shape[index] for name, index in dimensions.items() if name in files.state}
    if len(counts) > 1:
        raise UserError(f"the adapter in {files.directory} has heads of different sizes: {sorted(counts)}")
    return counts.pop() if counts else None


def read_class_names(path: str) -> list[str]:
    """Reads class names from a text file, one per line; the first is class 0.

    Raises:
        UserError: the file is unreadable or empty, or has a name twice.
    """
    try:
        labels = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class_names {path}: {error}") from error
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice or not labels:
        raise UserError(
            f"--class_names {path}: " + (f"duplicates: {', '.join(twice)}" if twice else "the file is empty")
        )
    return labels
