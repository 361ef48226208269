"""A checkpoint, an image cache and an adapter that an older commit wrote work with the present code.

`old_artifacts/README.md` says how they were made.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_dist_testing.launching import adapter_of, flags, lines_of
from lora_dist_testing.old_adapters import expected_of, logits
from safetensors.torch import load_file

from lora_dist import train
from lora_dist.data.cache.image_cache import CachedSplit, cached
from lora_dist.data.sources.load import load_data
from lora_dist.model.trained.classifier import load_classifier
from lora_dist.settings.train import DataSettings

ARTIFACTS = Path(__file__).parents[1] / "old_artifacts"
IMAGE_TIME = 1_700_000_000


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the artifacts as the working directory: the old commit recorded relative paths and the image times."""
    root = shutil.copytree(ARTIFACTS, tmp_path / "artifacts")
    for image in root.rglob("*.png"):
        os.utime(image, (IMAGE_TIME, IMAGE_TIME))
    monkeypatch.chdir(root)
    return root


def _cache_files(root: Path) -> dict[Path, tuple[int, bytes]]:
    """Inode and content of every cache file."""
    return {path: (path.stat().st_ino, path.read_bytes()) for path in (root / "cache").rglob("*.pixels")}


def test_an_old_checkpoint_is_resumed_to_the_adapter_of_the_old_run(artifacts: Path) -> None:
    """The checkpoint has two of four updates; the adapter is that of the uninterrupted run of the old commit."""
    cache = _cache_files(artifacts)
    train.main(flags(config="run/config.yaml", output_dir="run", resume_from_checkpoint="auto"))
    found, expected = adapter_of(artifacts / "run"), load_file(artifacts / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in lines_of(artifacts / "run") if "train/loss" in line] == [1, 2, 3, 4]
    assert _cache_files(artifacts) == cache


def test_an_old_image_cache_is_read_without_a_rebuild(artifacts: Path) -> None:
    cache = _cache_files(artifacts)
    data = load_data(DataSettings(train_dir="photos/train", validation_dir="photos/validation"), seed=42)
    split = cached(data.train, "cache", (16, 16), build=False)
    assert isinstance(split, CachedSplit)
    images = split.reader().read(0, range(len(split)))
    assert len(images) == 12
    for index, image in images.items():
        expected = np.asarray(data.train.image(index).resize((22, 18)))
        assert np.abs(np.array(image.source).astype(int) - expected).mean() < 8
    assert _cache_files(artifacts) == cache


def test_an_old_adapter_predicts_with_the_same_logits(artifacts: Path) -> None:
    classifier = load_classifier(artifacts / "adapter")
    assert classifier.labels == ["a", "b"]
    torch.testing.assert_close(logits(classifier.model), expected_of(artifacts / "adapter"), rtol=1e-4, atol=1e-5)
