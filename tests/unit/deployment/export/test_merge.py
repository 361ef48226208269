"""Merged models: rounded last, measured, and read by whatever reads transformers models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.architectures import make_checkpoint
from lora_dist_testing.edits import edit_tensors
from lora_dist_testing.old_adapters import logits
from lora_dist_testing.tiny import make_image, perturb, write_bundle
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageClassification, pipeline

from lora_dist.deployment.export.merge import merge_to
from lora_dist.deployment.export.older_peft import export_legacy_names
from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.model.trained.bundle import write_adapter
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.model.trained.parity import relative_difference
from lora_dist.settings.train import LoraSettings, ModelSettings

LABELS = ["x", "y", "z"]


def _adapter(directory: Path, base_model: Path, scale: float = 0.2) -> Path:
    write_bundle(directory, base_model, LABELS, scale=scale, lora_r=4)
    return directory


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_what_is_left_of_the_fp32_merge(architecture: Path, precision: Any, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", architecture)
    measured = merge_to(load_classifier(adapter), "x", tmp_path / "whole", [], 1e-4)
    assert measured.rounding is None
    half = merge_to(load_classifier(adapter), "x", tmp_path / "half", [], 1e-4, precision)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    whole_state = load_file(tmp_path / "whole" / "model.safetensors")
    half_state = load_file(tmp_path / "half" / "model.safetensors")
    assert half_state.keys() == whole_state.keys()
    for name, tensor in whole_state.items():
        assert half_state[name].dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
        assert torch.equal(half_state[name], tensor.to(half_state[name].dtype))
    # What was measured is what reading gives, and what the card says.
    assert half.rounding is not None
    assert half.merge == measured.merge < half.rounding < 0.05
    card = (tmp_path / "half" / "README.md").read_text()
    assert f"{half.rounding:.1e}" in card
    assert f"{half.merge:.1e}" in card
    size = 64 if architecture.name == "mobilevit" else 32
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "half", dtype=torch.float32)
    expected = logits(load_classifier(adapter).model, size)
    assert 0 < relative_difference(logits(plain, size), expected) < 0.05
    served = pipeline("image-classification", model=str(tmp_path / "half"), device="cpu")
    assert served.model.dtype == dtype
    assert {entry["label"] for entry in served(make_image(0, 0))} == set(LABELS)


def test_what_a_model_keeps_of_its_weights_is_rounded_as_they_are(tmp_path: Path) -> None:
    """LeViT keeps a table that it made of its attention biases."""
    base = make_checkpoint(tmp_path / "base", "levit")

    def set_biases(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.endswith("attention_biases")]:
            state[name] = 5 * torch.randn_like(state[name])

    torch.manual_seed(0)
    edit_tensors(base / "model.safetensors", set_biases)
    classifier = load_classifier(_adapter(tmp_path / "adapter", base, scale=0.02))
    # The written model is compared as strictly as ever, with that in memory.
    assert merge_to(classifier, "x", tmp_path / "half", [], 10.0, "bf16").rounding


def test_weights_too_large_for_fp16_are_refused(vit: Path, tmp_path: Path) -> None:
    classifier = load_classifier(_adapter(tmp_path / "adapter", vit))
    with torch.no_grad():
        classifier.model.get_base_model().vit.layernorm.bias[0] = 1e6
    with pytest.raises(UserError, match=r"in fp16 the merged model differs .* nothing was written"):
        merge_to(classifier, "x", tmp_path / "half", [], 1e-4, "fp16")
    assert not (tmp_path / "half").exists()


def test_a_rounding_that_changes_the_logits_is_refused(vit: Path, tmp_path: Path) -> None:
    """Features of a layer norm add up to 0, so a head of large weights lives by small differences between them."""
    base = load_base(str(vit), LABELS)
    model: Any = make_trainable(base, ModelSettings(), LoraSettings(lora_r=4))
    perturb(model)
    with torch.no_grad():
        model.get_base_model().classifier.weight.add_(300)
    write_adapter(tmp_path / "adapter", model, base, "card\n")
    classifier = load_classifier(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"in bf16 the merged model differs .* more than 5\.0e-02; nothing was written"):
        merge_to(classifier, "x", tmp_path / "half", [], 1e-2, "bf16")
    assert not (tmp_path / "half").exists()
    loose = merge_to(load_classifier(tmp_path / "adapter"), "x", tmp_path / "half", [], 10.0, "bf16")
    assert loose.rounding is not None
    assert 0.05 < loose.rounding < 10


def _disturb(classifier: Any) -> None:
    """Makes a model in memory another one than its weights say, as a mistake in what is written would."""
    base = classifier.model.get_base_model()
    base.register_forward_hook(lambda _, __, output: type(output)(logits=output.logits * 1.5))


def test_what_gives_other_logits_when_read_is_removed_again(vit: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", vit)
    writers: dict[str, Any] = {
        "merge_to": lambda classifier, out: merge_to(classifier, "x", out, [], 1e-4),
        "export_legacy_names": lambda classifier, out: export_legacy_names(classifier, "card\n", out, []),
    }
    for flag, write in writers.items():
        classifier = load_classifier(adapter)
        _disturb(classifier)
        with pytest.raises(UserError, match=rf"--{flag} .*out: the written model gave other logits .* was removed"):
            write(classifier, tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
