"""The frozen base of a classifier: loaded, and recognized by a fingerprint of its weights."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from lora_dist import demo, hub_client
from lora_dist.errors import UserError
from lora_dist.model.head import find_heads
from lora_dist.settings.train import Settings


@dataclass(frozen=True)
class Base:
    """A base model as loaded, before anything is added to it.

    Attributes:
        model: the classifier, a `transformers` model in fp32, its head sized for the labels.
        processor: its image processor.
        heads: names of the modules that are not of the backbone, and of parts that the checkpoint lacked.
        missing: parameters that the checkpoint lacked or had in another shape, and that are random now.
        name: path or Hub name.
        revision: commit on the Hub, if it came from there.
        fingerprint: of the backbone's weights.
    """

    model: Any
    processor: Any
    heads: list[str]
    missing: list[str]
    name: str
    revision: str | None
    fingerprint: str

    def identity(self) -> dict[str, str | None]:
        """What an adapter says of the base it belongs to."""
        return {"model_name_or_path": self.name, "revision": self.revision, "fingerprint": self.fingerprint}


def load_base(
    name: str,
    labels: Sequence[str],
    *,
    revision: str | None = None,
    seed: int = 0,
    init_from_config: bool = False,
    trust_remote_code: bool = False,
) -> Base:
    """Loads a base model and its processor, in fp32, with a head for `labels`.

    Args:
        name: Hub name, local directory, or a packaged model.
        labels: class names in order.
        revision: branch, tag or commit on the Hub.
        seed: of weights that the checkpoint lacks, such as a new head.
        init_from_config: all weights are random.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: the model cannot be found or is no image classifier.
    """
    name = demo.local_path(name)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    labelled: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
    torch.manual_seed(seed)
    try:
        with hub_client.reading(f"the base model {name}", f"`hf download {name}`"):
            processor = AutoImageProcessor.from_pretrained(name, **source)
            config = AutoConfig.from_pretrained(name, **source, **labelled)
            model, missing = (
                _random(config, trust_remote_code) if init_from_config else _pretrained(name, config, source)
            )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        # One of these comes of a missing name, an unreachable Hub, a foreign architecture and a truncated file.
        raise cannot_load(name, error) from error
    heads = find_heads(model, missing)
    return Base(
        model=model,
        processor=processor,
        heads=heads,
        missing=missing,
        name=name,
        revision=getattr(config, "_commit_hash", None),
        fingerprint=fingerprint(model, heads),
    )


def _random(config: Any, trust_remote_code: bool) -> tuple[Any, list[str]]:
    """A model with random weights, none of which is missing."""
    config.architectures = config.architectures or []
    made = AutoModelForImageClassification.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return made, []


def _pretrained(name: str, config: Any, source: dict[str, Any]) -> tuple[Any, list[str]]:
    """A model with its weights, and the names of those that are missing or of another shape."""
    model, loading = AutoModelForImageClassification.from_pretrained(
        name,
        config=config,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
        **source,
    )
    return model, sorted({*loading["missing_keys"], *(mismatch[0] for mismatch in loading["mismatched_keys"])})


def cannot_load(name: str, error: Exception) -> UserError:
    """In words of this project what `transformers` says of a model that it cannot load."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"the model {name!r} brings code of its own. If you trust where it comes from, --trust_remote_code runs it"
        )
    message = f"cannot load the base model {name!r} as an image classifier: "
    if Path(name).is_dir():
        return UserError(f"{message}{error}")
    elsewhere = "\nIf it is elsewhere now, say where: predict takes --base_model, and train --model_name_or_path"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return UserError(f"{message}there is no such directory.{elsewhere}")
    return UserError(
        f"{message}{error}{elsewhere}\nWhere there is no network, bring it here before, by `hf download {name}`; "
        "demo:vit, which is small, needs none"
    )


def load_base_of(settings: Settings, labels: Sequence[str], revision: str | None = None) -> Base:
    """The base that a training run's settings name.

    Args:
        settings: of the run.
        labels: class names in order.
        revision: to load it once more as it was, whatever has become of it on the Hub.
    """
    return load_base(
        settings.model.model_name_or_path,
        labels,
        revision=revision or settings.model.model_revision,
        seed=settings.run.seed,
        init_from_config=settings.model.init_from_config,
        trust_remote_code=settings.model.trust_remote_code,
    )


def fingerprint(model: nn.Module, heads: Sequence[str]) -> str:
    """Digest of the backbone's weights in fp32, whatever names a release of `transformers` gives them."""
    digests = sorted(
        hashlib.sha256(str(list(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes()).digest()
        for name, tensor in model.state_dict().items()
        if tensor.dtype == torch.float32 and not any(name.startswith(f"{head}.") for head in heads)
    )
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]
