"""Folders of images: which folders are classes, and which files are their images."""

from pathlib import Path

import pytest
from lora_dist_testing.tiny import make_folder

from lora_dist.audit.__main__ import audit
from lora_dist.data.sources.load import load_data
from lora_dist.errors import UserError
from lora_dist.settings.audit import AuditData, AuditSettings
from lora_dist.settings.train import DataSettings


def refusals(**settings: Path) -> set[str]:
    """The messages of training and of the audit."""
    given = {name: str(value) for name, value in settings.items()}
    messages = set()
    with pytest.raises(UserError) as caught:
        load_data(DataSettings(**given), 42)
    messages.add(str(caught.value))
    with pytest.raises(UserError) as caught:
        audit(AuditSettings(data=AuditData(**given)))
    return messages | {str(caught.value)}


# A folder above the right one


@pytest.mark.parametrize("above", ["", "photos", "photos/deep"])
@pytest.mark.parametrize(
    ("splits", "flags"),
    [
        (("train", "val"), ("train_dir train", "validation_dir val")),
        (("Training", "Validation", "test"), ("train_dir Training", "validation_dir Validation")),
        (("train", "test"), ("train_dir train",)),
        (("train",), ("train_dir train",)),
    ],
)
def test_a_folder_of_splits_is_answered_with_the_flags_to_use(
    above: str, splits: tuple[str, ...], flags: tuple[str, ...], tmp_path: Path
) -> None:
    for split in splits:
        make_folder(tmp_path / above / split, classes=("cat", "dog"), per_class=2)
    words = " ".join(f"--{flag} {tmp_path / above / name}" for flag, name in (pair.split() for pair in flags))
    for message in refusals(train_dir=tmp_path):
        assert message.startswith(f"--train_dir {tmp_path}: ")
        assert message.endswith(f"use {words}")


@pytest.mark.parametrize("depth", ["flowers", "flowers/flowers"])
def test_a_single_folder_around_the_class_folders_is_no_class(depth: str, tmp_path: Path) -> None:
    make_folder(tmp_path / depth, classes=("rose", "tulip"), per_class=2)
    for message in refusals(train_dir=tmp_path):
        assert message.endswith(f"use --train_dir {tmp_path / depth}")


def test_a_validation_folder_above_the_right_one_is_named_too(tmp_path: Path) -> None:
    for name in ("train", "all/train", "all/val", "zip/zip"):
        make_folder(tmp_path / name, classes=("cat", "dog"), per_class=2)
    for above, right in (("all", "all/val"), ("zip", "zip/zip")):
        for message in refusals(train_dir=tmp_path / "train", validation_dir=tmp_path / above):
            assert message.startswith(f"--validation_dir {tmp_path / above}: ")
            assert message.endswith(f"use --validation_dir {tmp_path / right}")


def test_folders_within_classes_and_classes_named_like_splits_are_fine(tmp_path: Path) -> None:
    make_folder(tmp_path / "stations", classes=("train", "test"), per_class=2)
    make_folder(tmp_path / "traffic", classes=("train/steam", "bus/red"), per_class=2)
    make_folder(tmp_path / "one", classes=("rose", "rose/garden"), per_class=2)
    make_folder(tmp_path / "some", classes=("train/steam",), per_class=2)
    for name, classes in (("stations", ["test", "train"]), ("traffic", ["bus", "train"]), ("one", ["rose"])):
        assert load_data(DataSettings(train_dir=str(tmp_path / name)), 42).labels == classes
    few = DataSettings(
        train_dir=str(tmp_path / "traffic"), validation_dir=str(tmp_path / "some"), allow_missing_classes=True
    )
    assert len(load_data(few, 42).validation) == 2
