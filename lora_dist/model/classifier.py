"""Loads a trained classifier, ready for prediction: an adapter on its base, or a whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoImageProcessor

from lora_dist.errors import UserError
from lora_dist.model import adapters
from lora_dist.model.adapter_io import ADAPTER_CONFIG, result_of_run
from lora_dist.model.backbone import Base, load_base
from lora_dist.model.bundle import BASE_MODEL, Origin, read_labels, read_origin


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify.

    Attributes:
        model: in evaluation mode, fp32; with its adapter, or whole.
        processor: its image processor.
        labels: class names in order.
        base: of an adapter: the name, revision and fingerprint of the base.
    """

    model: nn.Module
    processor: Any
    labels: list[str]
    base: dict[str, str | None] | None = None

    def probabilities(self, pixel_values: Tensor) -> Tensor:
        """Probabilities [B, classes] in fp32, of prepared images [B, 3, H, W] on the device of the model.

        Raises:
            UserError: a logit is not finite.
        """
        logits = self.model(pixel_values=pixel_values).logits.float()
        if not logits.isfinite().all():
            raise UserError("the logits of the model are not finite: its weights are damaged, or its training diverged")
        return logits.softmax(dim=-1)


def load_classifier(
    directory: Path,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> Classifier:
    """Loads what a run handed over, or an adapter or model from elsewhere.

    Args:
        directory: of the adapter or whole model.
        base_model: where the base is now, if not where the adapter says.
        trust_remote_code: run code that comes with the model.
        labels: class names of an adapter that has no label map.

    Raises:
        UserError: part of it is missing, or the base is another one than the adapter was trained on.
    """
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}")
    if not (directory / ADAPTER_CONFIG).is_file():
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} is no model: it has no config.json{result_of_run(directory)}")
        own = read_labels(directory)
        whole = load_base(str(directory), own, trust_remote_code=trust_remote_code)
        if whole.missing:
            raise UserError(
                f"{directory} is no whole {type(whole.model).__name__}: its weights lack {', '.join(whole.missing[:5])}"
            )
        return Classifier(whole.model.eval(), whole.processor, own)
    origin = read_origin(directory, base_model, trust_remote_code, labels)
    base = load_base(origin.base, origin.labels, revision=origin.revision, trust_remote_code=trust_remote_code)
    return attach_adapter(base, directory, origin)


def attach_adapter(base: Base, directory: Path, origin: Origin, name: str = adapters.DEFAULT) -> Classifier:
    """A classifier of a base and an adapter; the base may have adapters on it already, and then knows it by `name`.

    Raises:
        UserError: as of `check_base`, or the adapter's keys are not those of the base.
    """
    adapter, processor = check_base(base, directory, origin)
    model = adapters.attach_adapter(base.model, adapter, name, len(origin.labels))
    return Classifier(model, processor, origin.labels, base.identity())


def check_base(base: Base, directory: Path, origin: Origin) -> tuple[adapters.Adapter, Any]:
    """Reads an adapter for a base, and the processor that it was trained with.

    Raises:
        UserError: the base is another one than the adapter was trained on, or lacks what the adapter does not bring.
    """
    if origin.fingerprint not in (None, base.fingerprint):
        raise UserError(
            f"{base.name} is not the base that the adapter in {directory} was trained on: the fingerprint of its "
            f"weights is {base.fingerprint}, and that of {origin.named} was {origin.fingerprint}"
        )
    adapter = adapters.read_adapter(base.model, directory)
    random = [parameter for parameter in base.missing if parameter not in adapter.state]
    if random:
        raise UserError(
            f"{base.name} lacks weights that the adapter in {directory} does not bring either: {', '.join(random[:5])}"
        )
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", BASE_MODEL)):
        return adapter, base.processor
    try:
        return adapter, AutoImageProcessor.from_pretrained(directory, trust_remote_code=origin.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}/preprocessor_config.json is missing or damaged: {error}") from error
