"""Loads the models that the settings of a prediction name.

They are an adapter, a checkpoint, a weighted sum or a greedy soup of adapters, several adapters side by side, a whole
model, or an ONNX file.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lora_dist import demo, hub
from lora_dist.deployment import soup
from lora_dist.deployment.classify import Inference
from lora_dist.deployment.export.onnx_model import load_onnx
from lora_dist.deployment.inputs import find_images
from lora_dist.model.lora import adapter_io, adapters
from lora_dist.model.trained import checkpoint_adapter, infer_metadata
from lora_dist.model.trained.adapter_set import AdapterSet, load_adapter_set, load_weighted_sum
from lora_dist.model.trained.classifier import Classifier, load_classifier
from lora_dist.model.trained.temperature import UNCALIBRATED
from lora_dist.processes.lifetime import at_end
from lora_dist.settings.predict import ModelSource, PredictSettings

logger = logging.getLogger(__name__)


def choose_adapters(settings: PredictSettings, device: torch.device) -> tuple[PredictSettings, dict[str, Path]]:
    """Returns the directories of the adapters to load, by name, and the settings with the weights of an average.

    Raises:
        UserError: an adapter is not there, or the accuracy of a greedy soup cannot be measured.
    """
    source = settings.source
    locations = {name: hub.local_directory(location) for name, location in source.named_adapters}
    found = {name: adapter_of(directory) for name, directory in locations.items()}
    if not (source.average or source.greedy_soup):
        return settings, found
    members = _soup(settings, found, device) if source.greedy_soup else list(found)
    averaged = settings.model_copy(update={"source": source.averaged_over(members)})
    return averaged, {name: found[name] for name in members}


def adapter_of(directory: Path) -> Path:
    """Returns the directory of an adapter. For a checkpoint, this is a new adapter, which is deleted after the command.

    Raises:
        UserError: there is no adapter, or none can be made.
    """
    if not checkpoint_adapter.is_checkpoint(directory):
        adapter_io.require_adapter(directory)
        return directory
    made = Path(tempfile.mkdtemp(prefix="lora_dist-")) / directory.name
    at_end(partial(shutil.rmtree, made.parent, ignore_errors=True))
    checkpoint_adapter.write_adapter_of_checkpoint(directory, made)
    return made


def _soup(settings: PredictSettings, found: Mapping[str, Path], device: torch.device) -> list[str]:
    """Returns the names of the adapters that are most accurate together."""
    source, images = settings.source, settings.images
    blend = partial(
        load_weighted_sum,
        base_model=source.base_model,
        trust_remote_code=source.trust_remote_code,
        labels=read_labels(source),
    )
    inference = Inference(device, images.batch_size, images.num_workers)
    root = demo.local_path(source.greedy_soup or "")
    accuracy = partial(soup.accuracy, root=root, files=find_images([root]), inference=inference)
    return soup.greedy(found, blend, accuracy)


def load(settings: PredictSettings, found: Mapping[str, Path]) -> AdapterSet:
    """Loads the models: adapters that predict separately under their names, or one model under its title.

    Args:
        settings: as `choose_adapters` returned them.
        found: directories of the adapters by name.

    Raises:
        UserError: a model is missing or damaged, or adapters do not fit together.
    """
    source = settings.source
    if source.side_by_side:
        loaded = load_adapter_set(found, source.base_model, source.trust_remote_code, read_labels(source))
    else:
        loaded = AdapterSet({settings.title: _load_one(settings, found)})
    return loaded if source.adapter_scale == 1 else _scaled(loaded, source.adapter_scale)


def _scaled(loaded: AdapterSet, factor: float) -> AdapterSet:
    """Scales the updates of LoRA, drops the temperature, and warns of values that were fitted without the scale."""
    classifiers = loaded.classifiers
    adapters.scale_update(next(iter(classifiers.values())).model, factor)
    if any(one.calibration.temperature != 1 for one in classifiers.values()):
        logger.warning("the temperature was fitted without --adapter_scale: probabilities are not calibrated")
    if any(one.decision.record(one.labels) for one in classifiers.values()):
        logger.warning("the thresholds were chosen without --adapter_scale and may not suit the scaled adapter")
    return AdapterSet({name: replace(one, calibration=UNCALIBRATED) for name, one in classifiers.items()})


def _load_one(settings: PredictSettings, found: Mapping[str, Path]) -> Classifier:
    source = settings.source
    if not found and not source.model:
        return load_onnx(Path(settings.exporting.onnx or ""))
    labels = read_labels(source)
    if len(found) > 1:
        return load_weighted_sum(found, source.weights, source.base_model, source.trust_remote_code, labels)
    directory = next(iter(found.values())) if found else hub.local_directory(source.model or "")
    return load_classifier(directory, source.base_model, source.trust_remote_code, labels)


def read_labels(source: ModelSource) -> list[str] | None:
    """Reads the file of --class_names, if it is set."""
    return infer_metadata.read_class_names(source.class_names) if source.class_names else None
