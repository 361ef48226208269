"""Folds: every sample in one, each class spread evenly, groups whole, and the same on every machine."""

from pathlib import Path

import numpy as np
import pytest
from lora_dist_testing.tiny import make_folder

from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.stratified_folds import fold_numbers
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings, Settings
from lora_dist.settings.train_contradictions import contradictions


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_classes_and_folds_are_even(folds: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 23, 7]))
    numbers = fold_numbers(labels, None, folds, seed=1)
    for label in range(3):
        counts = np.bincount(numbers[labels == label], minlength=folds)
        assert counts.max() - counts.min() <= 1
    sizes = np.bincount(numbers)
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(numbers, fold_numbers(labels, None, folds, seed=1))
    assert (numbers != fold_numbers(labels, None, folds, seed=2)).any()


def test_groups_are_whole_and_classes_nearly_even() -> None:
    random = np.random.default_rng(3)
    labels, groups = random.choice(3, 600, p=[0.7, 0.25, 0.05]), random.integers(0, 90, 600).astype(str)
    numbers = fold_numbers(labels, groups.tolist(), 5, seed=1)
    assert all(len(set(numbers[groups == group])) == 1 for group in set(groups))
    for label in range(3):
        counts = np.bincount(numbers[labels == label], minlength=5)
        assert counts.min() >= 0.5 * counts.mean()
    order = random.permutation(600)
    np.testing.assert_array_equal(fold_numbers(labels[order], groups[order].tolist(), 5, seed=1), numbers[order])


@pytest.mark.parametrize("is_several", [False, True])
def test_classes_of_fewer_groups_than_folds_leave_no_fold_empty(is_several: bool) -> None:
    """Two patients of each of 20 classes: any two folds would do for one class, and five for all of them."""
    labels, groups = np.repeat(np.arange(20), 20), [f"patient {number // 10}" for number in range(400)]
    numbers = fold_numbers(np.eye(20, dtype=np.uint8)[labels] if is_several else labels, groups, 5, seed=0)
    assert np.bincount(numbers, minlength=5).tolist() == [80] * 5


def _sets(samples: int, shares: list[float], seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((samples, len(shares))) < shares).astype(np.uint8)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_each_of_several_labels_is_spread_evenly(folds: int) -> None:
    labels = _sets(400, [0.5, 0.2, 0.03, 0.3], seed=0)
    numbers = fold_numbers(labels, None, folds, seed=1)
    np.testing.assert_array_equal(numbers, fold_numbers(labels, None, folds, seed=1))
    assert (numbers != fold_numbers(labels, None, folds, seed=2)).any()
    for own in (*labels.T.astype(bool), labels.sum(axis=1) == 0):
        counts = np.bincount(numbers[own], minlength=folds)
        assert counts.max() - counts.min() <= 3
        assert counts.min() > 0
    assert np.bincount(numbers) == pytest.approx(400 / folds, abs=3)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_several_labels_are_whole_and_the_labels_nearly_even(seed: int) -> None:
    """With groups of all sizes, each of which has mostly the same labels."""
    random = np.random.default_rng(seed)
    members = np.sort(random.integers(0, 80, 600))
    own = random.random((80, 4)) < [0.6, 0.4, 0.3, 0.2]
    labels = (own[members] & (random.random((600, 4)) < 0.8)).astype(np.uint8)
    groups = np.char.add("patient ", members.astype(str))
    numbers = fold_numbers(labels, groups.tolist(), 5, seed)
    assert all(len(set(numbers[groups == group])) == 1 for group in set(groups.tolist()))
    for column in (*labels.T.astype(bool), labels.sum(axis=1) == 0):
        counts = np.bincount(numbers[column], minlength=5)
        assert counts.min() >= 0.5 * counts.mean()
    assert np.bincount(numbers).min() > 0.6 * 120
    order = random.permutation(600)
    np.testing.assert_array_equal(fold_numbers(labels[order], groups[order].tolist(), 5, seed), numbers[order])


def test_the_folds_are_these() -> None:
    """Runs of other folds, on other machines and of later releases, have to fit together with these."""
    labels, groups = np.arange(12) % 3, list("aabbccddeeff")
    assert fold_numbers(labels, None, 3, seed=42).tolist() == [0, 1, 2, 2, 1, 1, 1, 0, 2, 0, 2, 0]
    assert fold_numbers(labels, groups, 3, seed=42).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_each_image_of_a_folder_is_validated_once(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", per_class=(6, 5, 4))
    names: list[str] = []
    for number in (1, 2, 3):
        data = load_data(DataSettings(train_dir=str(tmp_path / "photos"), fold=f"{number}/3"), seed=1)
        assert len(data.train) + len(data.validation) == 15
        assert data.describe_splits()["fold"] == f"{number}/3"
        names += data.validation.names()
    assert sorted(names) == sorted(map(str, (tmp_path / "photos").rglob("*.png")))


def test_groups_of_a_file_of_labels_stay_whole_and_its_validation_images_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", per_class=8)
    lines = [f"{label}/{number:03d}.png,{label},{label}{number // 2}" for label in "abc" for number in range(8)]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["path,label,group", *lines]))
    settings = {"train_dir": str(tmp_path / "photos"), "labels_file": str(table), "fold": "1/2"}
    data = load_data(DataSettings(**settings), seed=1)
    assert data.validation.groups is not None
    assert not set(data.validation.groups) & set(data.train.groups)  # type: ignore[union-attr]
    assert len(data.validation) == 12
    with pytest.raises(UserError, match="no image is in this fold, because there are 12 groups: use fewer folds"):
        load_data(DataSettings(**settings | {"fold": "13/13"}), seed=1)
    splits = ("val" if "7.png" in line else "train" for line in lines)
    rows = [f"{line.rpartition(',')[0]},{split}" for line, split in zip(lines, splits, strict=True)]
    table.write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(UserError, match="both choose the validation images"):
        load_data(DataSettings(**settings), seed=1)


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "a/b", "2/", "-1/5"])
def test_impossible_folds_are_refused(fold: str) -> None:
    with pytest.raises(ValueError, match="expected a fold and the number of folds, such as 2/5"):
        DataSettings(fold=fold)


def test_wrong_combinations_are_named(tmp_path: Path) -> None:
    for name, value in (
        ("validation_dir", "."),
        ("streaming", True),
        ("max_eval_samples", 5),
        ("train_val_split", 0.2),
    ):
        settings = Settings(data=DataSettings(train_dir="/usr", fold="1/5", **{name: value}))  # type: ignore[arg-type]
        assert ("fold", name) in [problem.names for problem in contradictions(settings)]
    recorded = Settings(data=DataSettings(train_dir="/usr", fold="1/5", train_val_split=0.1))
    assert not list(contradictions(recorded)), "the record of a run has all defaults"
