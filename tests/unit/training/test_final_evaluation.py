"""Test data: evaluated once with the best model, never used to choose it, and recorded."""

from pathlib import Path

import pytest
from lora_dist_testing.launching import lines_of, results_of, run_flags
from lora_dist_testing.tiny import make_folder
from PIL import Image

from lora_dist.data.sources.load import load_data
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings, Settings
from lora_dist.settings.train_contradictions import contradictions
from lora_dist.train import main


@pytest.fixture(scope="module")
def swapped(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the first class under the name of the second, and the other way round."""
    root = tmp_path_factory.mktemp("swapped")
    first, second = sorted(path.name for path in (photos / "validation").iterdir())[:2]
    for source, target in ((first, second), (second, first)):
        (root / target).mkdir()
        for file in (photos / "validation" / source).iterdir():
            Image.open(file).save(root / target / file.name)
    return root


def test_test_data_is_evaluated_at_the_end_and_chooses_nothing(
    vit: Path, photos: Path, swapped: Path, tmp_path: Path
) -> None:
    settings = {"num_train_epochs": 3, "learning_rate": 1e-2, "eval_steps": 2}
    main(run_flags(vit, photos, tmp_path / "plain", **settings))
    main(run_flags(vit, photos, tmp_path / "tested", test_dir=swapped, **settings))
    plain, tested = results_of(tmp_path / "plain"), results_of(tmp_path / "tested")
    names = [name for name in plain if name.startswith("eval_")]
    assert {name: tested[name] for name in (*names, "best_step")} == {
        name: plain[name] for name in (*names, "best_step")
    }
    assert not any(name.startswith("test_") for name in plain)
    assert tested["test_samples"] == 6
    assert tested["test_accuracy"] < tested["eval_accuracy"]
    assert sum(row["support"] for row in tested["test_per_class"].values()) == 6
    assert not any("test" in name for line in lines_of(tmp_path / "tested") for name in line)
    card = (tmp_path / "tested" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"| test_accuracy | {tested['test_accuracy']:.4f} (95% interval 0.0000 to " in card
    assert "| test images | 6 |" in card


def test_test_data_has_the_classes_of_training_and_need_not_have_all(photos: Path, tmp_path: Path) -> None:
    settings = {"train_dir": str(photos / "train"), "test_dir": str(tmp_path / "test")}
    names = sorted(path.name for path in (photos / "train").iterdir())
    make_folder(tmp_path / "test", classes=(names[1],), per_class=2)
    data = load_data(DataSettings(**settings), 0)
    assert data.test is not None
    assert data.test.labels.tolist() == [1, 1]
    assert set(data.describe_splits()) == {"train", "validation", "test"}
    make_folder(tmp_path / "test", classes=("unknown",), per_class=2)
    with pytest.raises(UserError, match="the test data has classes that the training data lacks: unknown"):
        load_data(DataSettings(**settings), 0)


def test_a_folder_of_splits_as_test_data_names_the_right_one(photos: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_folder(tmp_path / split, classes=("a", "b"), per_class=2)
    with pytest.raises(UserError, match=f"use --test_dir {tmp_path / 'test'}"):
        load_data(DataSettings(train_dir=str(tmp_path / "train"), test_dir=str(tmp_path)), 0)


def test_wrong_combinations_are_named() -> None:
    wrong = Settings(data=DataSettings(train_dir=".", test_split="test"))
    assert "use --test_dir to test with a folder" in [problem.message for problem in contradictions(wrong)]
    wrong = Settings(data=DataSettings(dataset_name="x", test_dir="."))
    assert "use --test_split to test with a data set" in [problem.message for problem in contradictions(wrong)]
