"""What a checkpoint and the run that resumes it must have in common."""

from pathlib import Path

from lora_dist_testing.backbones import make_backbone

from lora_dist.model.base.backbone import BaseOptions, load_base
from lora_dist.training.identity import _entries, differences


def test_the_location_of_a_backbone_does_not_count_and_its_size_does(tmp_path: Path) -> None:
    def entries(name: str, **more: tuple[int, int]) -> dict[str, object]:
        base = load_base(str(make_backbone(tmp_path / name, "clip_vision")), ["x", "y"], BaseOptions(**more))
        return _entries("config", base.model.config.to_json_string(use_diff=False))

    here = entries("here")
    assert not list(differences(here, entries("there")))
    inner = dict(here["config.backbone_config"])  # type: ignore[call-overload]
    older = here | {"config.backbone_config": inner | {"_name_or_path": "elsewhere", "transformers_version": "5.0"}}
    assert not list(differences(older, here))
    (line,) = differences(here, entries("here", image_size=(48, 48)))
    assert "'image_size': 48" in line


def test_the_dtype_of_the_base_is_part_of_the_identity_and_was_fp32() -> None:
    assert not list(differences({"tuning": "lora"}, {"tuning": "lora", "base_dtype": "float32"}))
    for before in ({}, {"base_dtype": "float32"}):
        found = list(differences(before, {"base_dtype": "bfloat16"}))
        assert found == ["base_dtype was float32 and is now bfloat16"]
