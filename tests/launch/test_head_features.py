"""The head alone on two processes: each computes a share of the features, and all train on all of them."""

from pathlib import Path

import pytest
import torch
from lora_dist_testing.launching import adapter_of, run_flags, train


@pytest.mark.slow
def test_two_processes_train_a_head_on_features_as_one_does(vit: Path, photos: Path, tmp_path: Path) -> None:
    settings = {"tuning": "head", "augmentation": "none", "max_train_steps": 5, "probe": "true"}
    for name, launch_file, batch in (("one", None, 8), ("two", "ddp_cpu.yaml", 4)):
        arguments = run_flags(vit, photos, tmp_path / name, **settings, per_device_train_batch_size=batch)
        said = train(*arguments, launch_file=launch_file).stderr
        assert "computed 32 features of each of 36 images" in said
        assert "before training: linear probe" in said
    for name, tensor in adapter_of(tmp_path / "one").items():
        torch.testing.assert_close(adapter_of(tmp_path / "two")[name], tensor, rtol=1e-4, atol=1e-6)
    assert (tmp_path / "one" / "probe.json").read_bytes() == (tmp_path / "two" / "probe.json").read_bytes()
