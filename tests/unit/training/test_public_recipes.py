"""The recipes for public results train on stand-ins for their data: same columns, splits and types, few images."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from lora_dist_testing.tiny import make_image

from lora_dist import train
from lora_dist.settings import cli
from lora_dist.settings.train import Settings
from lora_dist.settings.train_contradictions import contradictions

CLASSES = ClassLabel(names=["x", "y", "z"])
COLUMNS = {
    "cifar100_lora": {"img": Image(), "fine_label": CLASSES, "coarse_label": ClassLabel(names=["a", "b"])},
    "resisc45": {"image": Image(), "label": CLASSES, "image_id": Value("string")},
    "pets": {"image": Image(), "label": CLASSES, "image_id": Value("string"), "label_cat_dog": ClassLabel(names=["c"])},
    "cars": {"image": Image(), "label": CLASSES},
}
SPLITS = {name: ["train", "test"] for name in COLUMNS} | {"resisc45": ["train", "validation", "test"]}


def _table(columns: dict[str, object], count: int) -> Dataset:
    """Images of three classes in turn; other columns have one value."""
    values = {"img": "image", "fine_label": "label"}
    filled: dict[str, list[object]] = {}
    for name, kind in columns.items():
        what = values.get(name, name)
        same: object = "1" if isinstance(kind, Value) else 0
        filled[name] = [
            make_image(index % 3, index) if what == "image" else index % 3 if what == "label" else same
            for index in range(count)
        ]
    return Dataset.from_dict(filled, features=Features(columns))


@pytest.mark.parametrize("name", COLUMNS)
def test_a_public_recipe_runs_dry_on_stand_ins(
    name: str, vit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    DatasetDict({split: _table(COLUMNS[name], 60) for split in SPLITS[name]}).save_to_disk(tmp_path / "data")
    train.main(
        ["--config", name, "--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(vit), "--dry_run"]
    )
    said = capfd.readouterr()
    held_out = {"cifar100_lora": 3, "resisc45": 60}.get(name, 6)
    assert f"{60 - held_out * (held_out < 60)} training and {held_out} validation images" in said.out + said.err
    assert "nothing was written" in said.err


@pytest.mark.parametrize("name", COLUMNS)
def test_a_public_recipe_measures_on_test_data_that_selects_nothing(name: str) -> None:
    settings = cli.parse(Settings, ["--config", name], prog="train", description="", contradictions=contradictions)
    data = settings.data
    assert data.test_split == "test"
    assert data.validation_split in (None, "validation")
    text = (cli.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert "Hardware:" in text
    assert "Not run by this project" in text
