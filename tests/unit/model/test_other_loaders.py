"""What the loaders of transformers and PEFT make of an adapter's directory: the right classes and logits, or an error.

The base and the adapter have two classes each, so that nothing but the names of the classes could tell them apart.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lora_dist_testing.tiny import make_model, write_bundle
from peft import AutoPeftModel, PeftModel
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from lora_dist.model.trained.classifier import Classifier, load_classifier

LABELS = ["day", "night"]


class Trained(NamedTuple):
    """Directories of a base and an adapter, the adapter as lora_dist loads it, and an image with its input."""

    base: Path
    adapter: Path
    classifier: Classifier
    image: Image.Image
    pixels: torch.Tensor


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    base = make_model(root / "base", num_labels=2)
    write_bundle(root / "adapter", base, LABELS)
    classifier = load_classifier(root / "adapter")
    image = Image.linear_gradient("L").convert("RGB").resize((40, 32))
    pixels = classifier.transforms().batch([image])
    return Trained(base, root / "adapter", classifier, image, pixels)


@torch.inference_mode()
def _logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    return model.eval()(pixel_values=pixels).logits


def test_a_directory_alone_is_refused_rather_than_loaded_with_the_names_of_the_base(trained: Trained) -> None:
    """Without our `config.json` transformers would load it, with the classes of the base."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForImageClassification.from_pretrained(trained.adapter)
    with pytest.raises(ValueError, match="Could not load model"):
        pipeline("image-classification", model=str(trained.adapter))


def test_peft_on_the_base_with_the_config_of_the_directory(trained: Trained) -> None:
    config = AutoConfig.from_pretrained(trained.adapter)
    base = AutoModelForImageClassification.from_pretrained(trained.base, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, str(trained.adapter))
    assert list(model.config.id2label.values()) == LABELS
    assert _logits(model, trained.pixels).equal(_logits(trained.classifier.model, trained.pixels))


def test_a_pipeline_of_the_base_with_the_config_of_the_directory(trained: Trained) -> None:
    config = AutoConfig.from_pretrained(trained.adapter)
    model = AutoModelForImageClassification.from_pretrained(trained.base, config=config, ignore_mismatched_sizes=True)
    model.load_adapter(str(trained.adapter))
    processor = AutoImageProcessor.from_pretrained(trained.adapter)
    found = pipeline("image-classification", model=model, image_processor=processor)(trained.image)
    with torch.inference_mode():
        ((expected, _),) = trained.classifier.top_k(trained.classifier.probabilities(trained.pixels), 2)
    assert found[0]["label"] == expected[0]
    assert found[0]["score"] == pytest.approx(expected[1], abs=1e-6)


def test_auto_peft_model_has_the_logits_but_not_the_names(trained: Trained) -> None:
    """It loads the base with the config of the base; `docs/python.md` says so."""
    model = AutoPeftModel.from_pretrained(str(trained.adapter))
    assert _logits(model, trained.pixels).equal(_logits(trained.classifier.model, trained.pixels))
    assert list(model.config.id2label.values()) == ["LABEL_0", "LABEL_1"]


def test_another_number_of_classes_is_an_error_in_auto_peft_model(trained: Trained, tmp_path: Path) -> None:
    write_bundle(tmp_path / "adapter", trained.base, ["a", "b", "c"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
