"""Pooled features: what goes into the last layer, whatever the architecture and whatever wraps it."""

from pathlib import Path

import pytest
import torch
from lora_dist_testing.tiny import ARCHITECTURES, WITHOUT_PREFIX, make_model, write_bundle
from torch import Tensor, nn

from lora_dist.data.pixels.transforms import output_size
from lora_dist.model.base.backbone import load_base
from lora_dist.model.features import PooledFeatures
from lora_dist.model.trained.adapter_set import load_adapter_set
from lora_dist.model.trained.classifier import Classifier, load_classifier

LABELS = ["a", "b", "c"]


def _features(classifier: Classifier) -> tuple[Tensor, Tensor]:
    """Features and logits of three images."""
    torch.manual_seed(0)
    with PooledFeatures(classifier.model) as features, torch.no_grad():
        logits = classifier.logits(torch.randn(3, 3, *output_size(classifier.processor)))
        return features.last(), logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *WITHOUT_PREFIX])
def test_the_last_layer_makes_the_logits_of_the_features(architecture: str, tmp_path: Path) -> None:
    base = load_base(str(make_model(tmp_path / "model", architecture, num_labels=3)), LABELS)
    features, logits = _features(Classifier(base.model.eval(), base.processor, LABELS))
    (last,) = (one for one in base.model.modules() if isinstance(one, nn.Linear) and one.out_features == len(LABELS))
    assert torch.allclose(last(features), logits, atol=1e-5)
    assert features.std(dim=0).max() > 0, "the same for all images"


def test_of_two_heads_there_is_the_mean(tmp_path: Path) -> None:
    base = load_base(str(make_model(tmp_path / "model", "swiftformer", num_labels=3)), LABELS)
    model = base.model.eval()
    features, logits = _features(Classifier(model, base.processor, LABELS))
    assert torch.allclose((model.head(features) + model.dist_head(features)) / 2, logits, atol=1e-5)


def test_of_two_heads_of_other_widths_there_are_both(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    tiny = {
        "img_size": 48,
        "img_scale": [1.0, 1.0],
        "depth": [[1, 1, 0]],
        "embed_dim": [8, 16],
        "num_heads": [1, 1],
        "mlp_ratio": [2, 2, 1],
    }
    model = timm.create_model("crossvit_9_240", num_classes=3, **tiny)
    model.pretrained_cfg |= {"input_size": (3, 48, 48), "num_classes": 3}
    timm.models.save_for_hf(model, tmp_path, model_args=tiny, safe_serialization=True)
    base = load_base(str(tmp_path), LABELS)
    features, logits = _features(Classifier(base.model.eval(), base.processor, LABELS))
    small, large = base.model.timm_model.head
    assert torch.allclose((small(features[:, :8]) + large(features[:, 8:])) / 2, logits, atol=1e-5)


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_adapters_have_their_own(architecture: str, tmp_path: Path) -> None:
    """Of several on one base, the active one; a head inside a sequence of layers too."""
    base = make_model(tmp_path / "base", architecture, num_labels=3)
    for name, seed in (("day", 0), ("night", 1)):
        write_bundle(tmp_path / name, base, LABELS, seed=seed, scale=0.5, lora_r=4)
    alone = {name: _features(load_classifier(tmp_path / name)) for name in ("day", "night")}
    assert not torch.allclose(alone["day"][0], alone["night"][0])
    loaded = load_adapter_set({name: tmp_path / name for name in alone})
    for name in ("night", "day"):
        features, logits = _features(loaded.set_adapter(name))
        assert torch.allclose(features, alone[name][0], atol=1e-6)
        assert torch.allclose(logits, alone[name][1], atol=1e-6)
