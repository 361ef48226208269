"""Loads a trained classifier for prediction: an adapter on its base, or a whole model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import Base, BaseOptions, load_base, read_processor
from lora_dist.model.base.model_files import ADAPTER_CONFIG, result_hint
from lora_dist.model.lora import adapters, parameter_names
from lora_dist.model.trained.bundle import (
    BASE_MODEL,
    AdapterBundle,
    read_bundle,
    read_calibration,
    read_conversion,
    read_decision,
    read_labels,
)
from lora_dist.model.trained.decision import Decision, MostLikely
from lora_dist.model.trained.temperature import UNCALIBRATED, Calibration


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify.

    Attributes:
        model: in evaluation mode and fp32, with an adapter or whole.
        processor: image processor.
        labels: class names in order.
        base: name, revision and fingerprint of an adapter's base.
        conversion: how images become 8-bit RGB.
        calibration: of the logits of the model.
        decision: turns logits into an answer.
    """

    model: nn.Module
    processor: Any
    labels: list[str]
    base: dict[str, str | None] | None = None
    conversion: Conversion = AS_TRANSFORMERS
    calibration: Calibration = UNCALIBRATED
    decision: Decision = field(default_factory=MostLikely)

    def transforms(self) -> ImageTransforms:
        """Returns what turns images into inputs of the model."""
        return ImageTransforms(self.processor, conversion=self.conversion)

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Computes logits [B, classes] in fp32 of inputs [B, 3, H, W] on the device of the model: its own, divided by
        the temperature.

        Raises:
            UserError: a logit is not finite.
        """
        logits = self.model(pixel_values=pixel_values).logits.float()
        if not logits.isfinite().all():
            raise UserError("the logits of the model are not finite: its weights are damaged, or its training diverged")
        return logits / self.calibration.temperature

    def probabilities(self, pixel_values: Tensor) -> Tensor:
        """Computes probabilities [B, classes] in fp32. Arguments and errors as `logits`."""
        return self.decision.scores(self.logits(pixel_values))

    def top_k(self, probabilities: Tensor, k: int) -> list[list[tuple[str, float]]]:
        """Returns the k most likely classes of each row of [B, classes] with their probabilities."""
        best = probabilities.topk(min(k, len(self.labels)))
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [[(self.labels[i], value) for i, value in zip(indices, values, strict=True)] for values, indices in rows]

    def chosen(self, probabilities: Tensor) -> Sequence[list[tuple[str, float]] | None]:
        """Returns the labels of each row of [B, classes] with their probabilities; None for one class per image."""
        rows = self.decision.chosen(probabilities)
        if rows is None:
            return [None] * len(probabilities)
        values = probabilities.tolist()
        return [[(self.labels[i], row[i]) for i in indices] for indices, row in zip(rows, values, strict=True)]


def load_classifier(
    directory: Path,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
) -> Classifier:
    """Loads the result of a run, or an adapter or model that another program wrote.

    Args:
        directory: of the adapter or whole model.
        base_model: overrides the recorded location of an adapter's base.
        trust_remote_code: run code that comes with the model.
        labels: class names of an adapter that has no label map.

    Raises:
        UserError: a file is missing or damaged, or the adapter was trained on another base.
    """
    if not directory.is_dir():
        raise UserError(f"no such directory: {directory}")
    if (directory / ADAPTER_CONFIG).is_file():
        bundle = read_bundle(directory, base_model, trust_remote_code, labels)
        return attach_adapter(load_base_of_bundle(bundle), bundle)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not a model: it has no config.json{result_hint(directory)}")
    names = read_labels(directory)
    decision = read_decision(directory, names)
    whole = load_base(
        str(directory), names, BaseOptions(trust_remote_code=trust_remote_code, problem_type=decision.problem_type)
    )
    if whole.missing:
        raise UserError(
            f"{directory} is not a complete {type(whole.model).__name__}: its weights lack "
            f"{', '.join(whole.missing[:5])}"
        )
    return Classifier(
        whole.model.eval(),
        whole.processor,
        names,
        conversion=read_conversion(directory),
        calibration=read_calibration(directory),
        decision=decision,
    )


def load_base_of_bundle(bundle: AdapterBundle) -> Base:
    """Loads the base of an adapter, with a head for its classes, as it was in training."""
    return load_base(
        bundle.base,
        bundle.labels,
        BaseOptions(
            revision=bundle.revision,
            trust_remote_code=bundle.trust_remote_code,
            pooling=bundle.pooling,
            image_size=bundle.image_size,
            processor=own_processor(bundle),
            problem_type=bundle.decision.problem_type,
        ),
    )


def attach_adapter(base: Base, bundle: AdapterBundle, name: str = parameter_names.DEFAULT) -> Classifier:
    """Puts an adapter under a name on its base, which may already have other adapters.

    Raises:
        UserError: as `check_base`, or the adapter's keys are not those of the base.
    """
    adapter, processor = check_base(base, bundle)
    model = adapters.attach_adapter(base.model, adapter, name, len(bundle.labels))
    return Classifier(
        model, processor, bundle.labels, base.identity(), bundle.conversion, bundle.calibration, bundle.decision
    )


def check_base(base: Base, bundle: AdapterBundle) -> tuple[adapters.Adapter, Any]:
    """Returns a bundle's adapter with the parameter names of its base, and its processor, or else that of the base.

    Raises:
        UserError: the adapter was trained on another base, or neither has weights that the model needs.
    """
    directory = bundle.files.directory
    if bundle.fingerprint not in (None, base.fingerprint):
        raise UserError(
            f"{base.name} is not the base that the adapter in {directory} was trained on: its weights have the "
            f"fingerprint {base.fingerprint}, and those of {bundle.trained_base} had {bundle.fingerprint}. Name "
            f"the base that has these weights: --base_model in prediction, --model_name_or_path in training"
        )
    adapter = adapters.adapter_for(base.model, bundle.files)
    random = [parameter for parameter in base.missing if parameter not in adapter.state]
    if random:
        raise UserError(f"neither {base.name} nor the adapter in {directory} has weights for {', '.join(random[:5])}")
    return adapter, own_processor(bundle) or base.processor


def own_processor(bundle: AdapterBundle) -> Any:
    """Reads the image processor in an adapter's directory; None if another program wrote the adapter without one.

    Raises:
        UserError: it is missing or damaged.
    """
    directory = bundle.files.directory
    if not any((directory / name).is_file() for name in ("preprocessor_config.json", BASE_MODEL)):
        return None
    return read_processor(directory, bundle.trust_remote_code)
