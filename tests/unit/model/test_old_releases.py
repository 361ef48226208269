"""Old releases read what is made here, and make what is read here: only where such an environment is at hand.

`LORA_DIST_OLD_PYTHON` names its interpreter, or several separated by colons; `old_releases/README.md` says how to make
one. Every test runs a real process there.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_dist_testing.launching import environment
from lora_dist_testing.old_adapters import OLD, expected_of, logits
from lora_dist_testing.tiny import make_image, write_bundle

from lora_dist.deployment.export.merge import merge_to
from lora_dist.deployment.export.older_peft import export_legacy_names
from lora_dist.model.trained.classifier import load_classifier

INTERPRETERS = [path for path in os.environ.get("LORA_DIST_OLD_PYTHON", "").split(":") if path]
LABELS = ["x", "y", "z"]

pytestmark = pytest.mark.skipif(not INTERPRETERS, reason="LORA_DIST_OLD_PYTHON names no environment")


TARGETS = {
    "convnext": ["pwconv1", "pwconv2"],
    "resnet": ["convolution"],
    **{name: ["query", "value"] for name in ("vit", "deit", "beit", "swin", "swinv2", "dinov2", "mobilevit")},
}


class Old:
    """An environment of an old release."""

    def __init__(self, interpreter: str) -> None:
        self.interpreter = interpreter
        code = "import importlib.metadata as m; print(m.version('peft'))"
        version = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout
        self.peft = tuple(int(part) for part in version.strip().split(".")[:2])

    def run(self, *words: object) -> Any:
        """Runs `old.py` there, and returns what it prints, as JSON."""
        result = subprocess.run(
            [self.interpreter, str(OLD / "old.py"), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(PYTHONPATH=""),
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1]) if result.stdout.strip() else None


@pytest.fixture(params=INTERPRETERS or ["none"], scope="module")
def old(request: pytest.FixtureRequest) -> Old:
    """Each environment in turn."""
    return Old(request.param)


def _size(architecture: Path) -> int:
    return 64 if architecture.name == "mobilevit" else 32


def _adapter(directory: Path, base_model: Path, **lora: Any) -> Path:
    write_bundle(directory, base_model, LABELS, lora_r=4, **lora)
    return directory


def _skip_unknown(old: Old, architecture: Path) -> None:
    """DINOv2 came later than the guide's releases, and so did LoRA on convolutions."""
    if old.peft < (0, 3) and architecture.name in ("dinov2", "resnet"):
        pytest.skip("unknown to this release")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merged_model_is_read(old: Old, architecture: Path, precision: Any, tmp_path: Path) -> None:
    """Whole: nothing missing, nothing left over, the same logits, and labels in a pipeline."""
    if old.peft < (0, 3) and architecture.name == "dinov2":
        pytest.skip("unknown to this release")
    adapter = _adapter(tmp_path / "adapter", architecture)
    merge_to(load_classifier(adapter), "x", tmp_path / "merged", [], 1e-4, precision)
    read = old.run("logits", tmp_path / "merged", "--size", _size(architecture))
    assert read["unexpected"] == []
    # Swin's table of positions is computed now, and was saved as well then; where it is missing it was computed, too.
    assert [name for name in read["missing"] if not name.endswith("attention.self.relative_position_index")] == []
    expected = logits(load_classifier(tmp_path / "merged").model, _size(architecture))
    torch.testing.assert_close(torch.tensor(read["logits"]), expected, rtol=1e-4, atol=1e-4)
    if precision == "fp32":
        make_image(0, 0).save(tmp_path / "image.png")
        rows = old.run("pipeline", tmp_path / "merged", tmp_path / "image.png")
        assert {row["label"] for row in rows} == set(LABELS)


@pytest.mark.parametrize("lora", [{}, {"lora_bias": "all"}], ids=str)
def test_an_exported_adapter_is_read(old: Old, architecture: Path, lora: dict[str, Any], tmp_path: Path) -> None:
    _skip_unknown(old, architecture)
    if lora and architecture.name not in ("vit", "swin"):
        pytest.skip("two architectures are enough")
    adapter = _adapter(tmp_path / "adapter", architecture, **lora)
    classifier = load_classifier(adapter)
    export_legacy_names(classifier, "card\n", tmp_path / "old", [])
    read = old.run("logits", architecture, "--adapter", tmp_path / "old", "--size", _size(architecture))
    expected = logits(classifier.model, _size(architecture))
    torch.testing.assert_close(torch.tensor(read["logits"]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pickled", [True, False])
def test_an_adapter_made_there_is_read_here(old: Old, architecture: Path, pickled: bool, tmp_path: Path) -> None:
    _skip_unknown(old, architecture)
    if not pickled and old.peft < (0, 5):
        pytest.skip("this release writes pickles alone")
    words = [] if old.peft < (0, 5) else ["--option", f"safe_serialization={json.dumps(not pickled)}"]
    targets = TARGETS[architecture.name]
    old.run("adapter", architecture, tmp_path / "there", *targets, "--size", _size(architecture), *words)
    assert (tmp_path / "there" / "adapter_model.bin").is_file() == pickled
    classifier = load_classifier(tmp_path / "there")
    assert classifier.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    expected = expected_of(tmp_path / "there")
    torch.testing.assert_close(logits(classifier.model, _size(architecture)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - expected_of(tmp_path / "there", "logits_without")).abs().max() > 1e-2
