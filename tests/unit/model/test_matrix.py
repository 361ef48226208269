"""Every architecture behind `AutoModelForImageClassification`, and timm, through all that users do with a model."""

import re
from pathlib import Path

import pytest
from lora_dist_testing.matrix import ALL, MARKS, PAGE, outcomes, reasons, row
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

QUICK = ("LoRA", "plain PEFT", "merge", "full", "gradient checkpointing")
KINDS = ("swinv2", "clip", "levit", "cvt", "efficientnet", "perceiver", "timm eva02", "timm mobilenetv4")


@pytest.mark.parametrize("name", KINDS)
def test_architectures_of_many_kinds_do_what_the_table_says(name: str, tmp_path: Path) -> None:
    found = outcomes(name, tmp_path, QUICK)
    assert {outcome.kind for outcome in found.values()} <= {"done", "absent"}, reasons(name, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_architecture_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    found = outcomes(name, tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    assert row(name, found) in page
    assert all(reason in page for reason in reasons(name, found))


def test_the_table_has_all_classes_and_most_of_them_are_clean() -> None:
    rows = dict(re.findall(r"^\| ([\w -]+) \|((?: [^|]+ \|)+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(ALL) <= rows.keys()
    clean = {name for name in ALL if set(rows[name].replace("|", " ").split()) <= {MARKS["done"], MARKS["absent"]}}
    assert {name for name in ALL if name.startswith("timm ")} <= clean
    assert MARKS["failed"] not in "".join(rows.values())
    # Those of timm stand for one class.
    classes = {name for name in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if name in clean} | {"timm_wrapper"}
    assert len(classes) >= 33
