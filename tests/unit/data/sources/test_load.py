"""Where images and labels come from: two splits under one label map, or an error that names what is missing."""

import os
import subprocess
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from lora_dist_testing import unprivileged
from lora_dist_testing.tiny import make_folder, make_image, make_png, write_tar

from lora_dist.audit.audit import audit
from lora_dist.data.pixels.images import UnreadableImageError
from lora_dist.data.sources.exclusions import Section, write_exclusions
from lora_dist.data.sources.load import ImageData, load_data, load_validation
from lora_dist.data.sources.split import Split, stratified_split
from lora_dist.errors import UserError
from lora_dist.settings.audit import AuditData, AuditSettings
from lora_dist.settings.train import DataSettings


def load(seed: int = 42, **settings: Any) -> ImageData:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return load_data(DataSettings(**given), seed)


def names(split: Split) -> list[str]:
    return [split.name(index) for index in range(len(split))]


def classes_of(split: Split, labels: list[str]) -> list[str]:
    return [labels[label] for label in split.labels]


def counts(split: Split, classes: int) -> list[int]:
    return np.bincount(split.labels, minlength=classes).tolist()


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(**settings)
    return str(caught.value)


# Folders


def test_a_folder_has_a_class_for_each_sub_folder(photos: Path) -> None:
    data = load(train_dir=photos / "train", validation_dir=photos / "validation")
    assert data.labels == ["a", "b", "c"]
    assert (counts(data.train, 3), counts(data.validation, 3)) == ([11, 9, 7], [3, 3, 3])
    for split in (data.train, data.validation):
        assert classes_of(split, data.labels) == [Path(name).parent.name for name in names(split)]
    assert names(data.train) == sorted(str(path) for path in (photos / "train").rglob("*.png"))
    np.testing.assert_array_equal(np.asarray(data.train.image(12)), np.asarray(make_image(1, 1)))


def test_samples_are_read_together_as_they_are_one_by_one(photos: Path) -> None:
    split = load(train_dir=photos / "train", validation_dir=photos / "validation").train
    split = split.select(np.arange(len(split))[::-2])
    rows = [3, 0, 11, 3]
    read = split.read(0, rows)
    assert list(read) == [3, 0, 11]
    assert [one.name for one in read.values()] == [split.name(row) for row in read]
    assert [one.label for one in read.values()] == split.labels[list(read)].tolist()
    assert split.read(0, []) == {}


def test_classes_without_an_image_and_one_class_alone_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path / "some", classes=("a", "c"), per_class=4)
    (tmp_path / "some" / "b").mkdir()
    load(train_dir=tmp_path / "some", train_val_split=0.5)
    assert "1 of 3 classes have no training image: b" in caplog.text
    assert "one class" not in caplog.text
    caplog.clear()
    load(train_dir=tmp_path / "some", train_val_split=0.5, allow_missing_classes=True)
    assert "no training image: b" in caplog.text
    make_folder(tmp_path / "one", classes=("a",), per_class=4)
    load(train_dir=tmp_path / "one", train_val_split=0.5)
    assert "all training images are of one class" in caplog.text


def test_classes_are_in_lexicographic_order_and_not_in_that_of_numbers(tmp_path: Path) -> None:
    """As `datasets` and torchvision order them; a label map from elsewhere stays valid."""
    make_folder(tmp_path, classes=("2", "10", "1", "B", "a"), per_class=2)
    assert load(train_dir=tmp_path).labels == ["1", "10", "2", "B", "a"]


def test_images_may_stand_in_folders_within_a_class(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("a/deep/down", "a/x", "b"), per_class=2)
    make_folder(tmp_path, classes=("a",), per_class=2)
    data = load(train_dir=tmp_path, train_val_split=0.5)
    together = sorted(names(data.train) + names(data.validation))
    assert len(together) == 8
    assert data.labels == ["a", "b"]
    assert (counts(data.train, 2), counts(data.validation, 2)) == ([3, 1], [3, 1])


def test_folders_within_a_class_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    inner = [f"a/{number * 7 % 16:02d}" for number in range(16)]
    make_folder(tmp_path, classes=(*inner, "b"), per_class=1)
    found = names(load(train_dir=tmp_path, validation_dir=tmp_path).train)
    assert found == [str(tmp_path / name / "000.png") for name in (*sorted(inner), "b")]


def test_the_order_does_not_depend_on_that_of_the_disk(tmp_path: Path) -> None:
    """Files are created in another order, and one folder is a link."""
    make_folder(tmp_path / "one", per_class=3)
    for label, name in reversed(list(enumerate("abc"))):
        (tmp_path / "two" / name).mkdir(parents=True)
        for number in (2, 0, 1):
            make_image(label, number).save(tmp_path / "two" / name / f"{number:03d}.png")
    (tmp_path / "three").symlink_to(tmp_path / "one")
    one, two, three = (load(train_dir=tmp_path / name) for name in ("one", "two", "three"))
    assert one.train.fingerprint() == two.train.fingerprint() == three.train.fingerprint()
    assert [Path(name).name for name in names(one.train)] == [Path(name).name for name in names(two.train)]


def test_only_images_count_and_hidden_files_do_not(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("a", "b"), per_class=2)
    make_image(0, 0).save(tmp_path / "a" / "UPPER.JPG")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "a" / "._000.png").write_bytes(b"left by a Mac")
    (tmp_path / ".cache").mkdir()
    make_image(0, 0).save(tmp_path / ".cache" / "x.png")
    make_image(0, 0).save(tmp_path / "stray.png")
    data = load(train_dir=tmp_path, train_val_split=0.4)
    assert data.labels == ["a", "b"]
    assert {Path(name).name for name in names(data.train) + names(data.validation)} == {
        "000.png",
        "001.png",
        "UPPER.JPG",
    }


def test_what_stands_in_hidden_folders_is_left_out(tmp_path: Path) -> None:
    """Jupyter leaves copies there."""
    make_folder(tmp_path, classes=("a", "a/.ipynb_checkpoints", "a/x/.trash/y", "b"), per_class=2)
    data = load(train_dir=tmp_path, train_val_split=0.5)
    assert sorted(names(data.train) + names(data.validation)) == [
        str(tmp_path / name / f"00{number}.png") for name in "ab" for number in (0, 1)
    ]


@pytest.mark.parametrize("closed", ["", "a", "a/deep/down"])
def test_a_folder_that_may_not_be_read_is_named(closed: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_folder(root, classes=("a", "a/deep/down", "b"), per_class=2)
    (root / closed).chmod(0)
    code = "import sys; from lora_dist.data.sources.folders import read_class_folders; read_class_folders(sys.argv[1])"
    try:
        result = subprocess.run(unprivileged.python("-c", code, root), capture_output=True, text=True, check=False)
    finally:
        (root / closed).chmod(0o700)
    assert result.stderr.splitlines()[-1] == (
        f"lora_dist.errors.UserError: {root / closed}: Permission denied; all of the data has to be readable"
    )


@pytest.mark.parametrize("target", ["..", ".", "../.."])
def test_a_class_that_is_a_link_to_all_classes_is_refused(target: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "in" / "data", classes=("a", "b"), per_class=2)
    link = tmp_path / "in" / "data" / "up"
    link.symlink_to(target)
    assert f"{link} is a link to one of its parent folders" in refusal(train_dir=tmp_path / "in" / "data")
    link.unlink()
    link.symlink_to(make_folder(tmp_path / "other", classes=("deep",), per_class=2))
    assert load(train_dir=tmp_path / "in" / "data").labels == ["a", "b", "up"]


def test_a_validation_folder_with_fewer_folders_on_the_disk_keeps_the_numbers_of_training(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", classes=("a", "b", "c"))
    make_folder(tmp_path / "validation", classes=("c", "b"), per_class=2)
    data = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "validation", allow_missing_classes=True)
    assert data.labels == ["a", "b", "c"]
    assert data.validation.labels.tolist() == [1, 1, 2, 2]


def test_a_class_without_validation_images_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", classes=("a", "b", "c", "d"))
    make_folder(tmp_path / "validation", classes=("b", "d"))
    message = refusal(train_dir=tmp_path / "train", validation_dir=tmp_path / "validation")
    assert "classes without a single validation image: a, c." in message
    assert "--allow_missing_classes" in message


def test_a_class_without_training_images_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", classes=("a", "b"))
    (tmp_path / "train" / "c").mkdir()
    make_folder(tmp_path / "validation", classes=("a", "b", "c"))
    message = refusal(train_dir=tmp_path / "train", validation_dir=tmp_path / "validation")
    assert "classes without a single training image: c." in message


@pytest.mark.parametrize("allowed", [False, True])
def test_a_class_that_only_validation_knows_is_named(allowed: bool, tmp_path: Path) -> None:
    make_folder(tmp_path / "train", classes=("a", "b"))
    make_folder(tmp_path / "validation", classes=("a", "b", "x", "y"))
    message = refusal(
        train_dir=tmp_path / "train", validation_dir=tmp_path / "validation", allow_missing_classes=allowed
    )
    assert "classes that the training data lacks: x, y" in message


def test_a_single_image_of_a_class_cannot_be_split(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("a", "b"), per_class=(4, 1))
    assert "without a single validation image: b" in refusal(train_dir=tmp_path)
    data = load(train_dir=tmp_path, allow_missing_classes=True)
    assert counts(data.train, 2)[1] == 1


@pytest.mark.parametrize("content", ["nothing", "images without classes", "classes without images"])
def test_a_folder_without_data_says_how_it_should_look(content: str, tmp_path: Path) -> None:
    if content == "images without classes":
        make_image(0, 0).save(tmp_path / "1.png")
    if content == "classes without images":
        (tmp_path / "rose").mkdir()
        (tmp_path / "rose" / "notes.txt").write_text("none yet")
    message = refusal(train_dir=tmp_path)
    assert str(tmp_path) in message
    assert ("no images" if content == "classes without images" else "class folders") in message


# Hold-out


def test_the_hold_out_is_a_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    kept, held_out = stratified_split(labels, 0.2, seed=1)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [20, 2, 1, 0]
    assert sorted([*kept, *held_out]) == list(range(113))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held_out) > 0).all()


def test_every_class_keeps_an_image_to_train_on() -> None:
    labels = np.repeat([0, 1], [2, 5])
    kept, _ = stratified_split(labels, 0.99, seed=1)
    assert np.bincount(labels[kept]).tolist() == [1, 1]


def test_the_hold_out_follows_the_seed_and_nothing_else() -> None:
    labels = np.arange(300) % 3
    first, again, other = (stratified_split(labels, 0.3, seed)[1].tolist() for seed in (5, 5, 6))
    np.random.seed(0)
    assert first == again == stratified_split(labels, 0.3, 5)[1].tolist()
    assert first != other


def test_classes_are_held_out_independently() -> None:
    """The images of one class do not decide which ones of another are held out."""
    first = stratified_split(np.repeat([0, 1], [50, 50]), 0.2, 3)[1]
    second = stratified_split(np.repeat([0, 1], [50, 80]), 0.2, 3)[1]
    assert first[first < 50].tolist() == second[second < 50].tolist()
    assert first[first < 50].tolist() != (first[first >= 50] - 50).tolist()


def test_no_image_is_in_both_parts_and_none_is_lost(photos: Path) -> None:
    data = load(train_dir=photos / "train", train_val_split=0.3)
    assert (counts(data.train, 3), counts(data.validation, 3)) == ([8, 6, 5], [3, 3, 2])
    assert sorted(names(data.train) + names(data.validation)) == sorted(map(str, (photos / "train").rglob("*.png")))
    same, other = (load(train_dir=photos / "train", train_val_split=0.3, seed=seed) for seed in (42, 43))
    assert same.describe_splits() == data.describe_splits()
    assert names(other.validation) != names(data.validation)


def test_the_split_is_written_down_so_that_it_can_be_found_again(photos: Path) -> None:
    data = load(train_dir=photos / "train")
    described = data.describe_splits()
    assert described["train"]["num_samples"] == len(described["train"]["rows"]) == len(data.train)
    every = sorted(map(str, (photos / "train").rglob("*.png")))
    assert [every[row] for row in described["validation"]["rows"]] == names(data.validation)


# Limits and fingerprints


def test_limits_select_at_random_by_the_seed(photos: Path) -> None:
    folders = {"train_dir": photos / "train", "validation_dir": photos / "validation"}
    whole = load(**folders)
    data = load(**folders, max_train_samples=9, max_eval_samples=4)
    assert (len(data.train), len(data.validation)) == (9, 4)
    assert names(data.train) != names(whole.train)[:9]
    assert set(names(data.train)) < set(names(whole.train))
    assert len(set(names(data.train))) == 9
    assert classes_of(data.train, data.labels) == [Path(name).parent.name for name in names(data.train)]
    again, other = (load(**folders, max_train_samples=9, seed=seed) for seed in (42, 43))
    assert names(again.train) == names(data.train) != names(other.train)
    assert names(load(**folders, max_train_samples=99).train) == names(whole.train)


@pytest.mark.parametrize("setting", ["max_train_samples", "max_eval_samples"])
def test_limits_are_stratified_and_say_which_classes_they_leave_out(
    setting: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, classes=("a", "b", "c"), per_class=(20, 1, 9))

    def selected(limit: int, **more: Any) -> list[int]:
        data = load(train_dir=tmp_path, validation_dir=tmp_path, **{setting: limit}, **more)
        return counts(data.train if setting == "max_train_samples" else data.validation, 3)

    assert [selected(limit) for limit in (3, 15, 29)] == [[1, 1, 1], [10, 1, 4], [19, 1, 9]]
    assert "leaves out" not in caplog.text
    assert selected(2) == [1, 0, 1]
    assert f"--{setting} 2 leaves out 1 of 3 classes: b" in caplog.text


def test_the_fingerprint_tells_selections_labels_and_files_apart(tmp_path: Path) -> None:
    def fingerprint(name: str, classes: tuple[str, ...] = ("a", "b"), first: int = 0, **more: Any) -> str:
        make_folder(tmp_path / name, classes=classes, per_class=4, first=first)
        return load(train_dir=tmp_path / name, **more).train.fingerprint()

    same = {fingerprint("1"), fingerprint("2"), fingerprint("3", classes=("x", "y"))}
    assert len(same) == 1, "where a folder stands and what its classes are called does not matter"
    assert len({fingerprint("1"), fingerprint("4", first=2), fingerprint("1", max_train_samples=5)}) == 3
    assert fingerprint("1") != fingerprint("5", classes=("a", "b", "c"))


def test_the_fingerprint_needs_no_file_names(tmp_path: Path) -> None:
    """Images of a parquet file have none; rows and labels tell the splits apart."""
    _saved(tmp_path, {"image": _cells([0] * 8), "label": [0, 1] * 4}, _features(ClassLabel(names=["x", "y"])))
    split = load(dataset_name=tmp_path).train
    first, second = np.flatnonzero(split.labels == 0)[:2]
    assert split.select(np.array([first])).fingerprint() != split.select(np.array([second])).fingerprint()
    relabelled = replace(split, labels=1 - split.labels)
    assert relabelled.fingerprint() != split.fingerprint()
    assert replace(split, labels=split.labels.copy()).fingerprint() == split.fingerprint()


def test_the_fingerprint_tells_changed_files_apart_and_copies_not(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return load(train_dir=tmp_path, validation_dir=tmp_path).train.fingerprint()

    make_folder(tmp_path, classes=("a", "b"), per_class=100)
    before, file = fingerprint(), tmp_path / "a" / "000.png"
    os.utime(file, (1, 1))
    assert fingerprint() == before, "times are those of the copy"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert fingerprint() != before, "of some files the content counts"
    file.write_bytes(content)
    assert fingerprint() == before
    seen = {before}
    for number in (50, 51, 52, 53):
        (tmp_path / "a" / f"{number:03d}.png").write_bytes(content + b"x" * number)
        seen.add(fingerprint())
    assert len(seen) == 5, "of all files the size counts"
    (tmp_path / "b" / "033.png").unlink()
    (tmp_path / "b" / "033.png").symlink_to("nowhere")
    assert fingerprint() not in seen


def test_the_fingerprint_tells_embedded_images_apart(tmp_path: Path) -> None:
    features = _features(ClassLabel(names=["x", "y"]))
    prints = set()
    for number, indices in enumerate(([0] * 8, [0] * 7 + [1], [0] * 3 + [1] + [0] * 4)):
        _saved(tmp_path / str(number), {"image": _cells(indices), "label": [0, 1] * 4}, features)
        data = load(dataset_name=tmp_path / str(number), train_val_split=0.5, seed=1)
        prints.add((data.train.fingerprint(), data.validation.fingerprint()))
    assert len(prints) == 3


@pytest.mark.timeout(60)
def test_the_fingerprint_of_very_many_files_takes_no_time(tmp_path: Path) -> None:
    for folder in range(100):
        (tmp_path / f"{folder:03d}").mkdir()
        for number in range(200):
            (tmp_path / f"{folder:03d}" / f"{number}.png").write_bytes(b"x")
    data = load(train_dir=tmp_path, validation_dir=tmp_path)
    start = time.process_time()
    first = data.train.fingerprint()
    assert time.process_time() - start < 2
    (tmp_path / "000" / "0.png").unlink()
    assert data.train.fingerprint() == first, "once for a run, as it began"


# Files left out


def _list(file: Path, *paths: object) -> Path:
    file.write_text("".join(f"{path}\n" for path in paths))
    return file


def test_listed_files_are_left_out_of_both_splits(photos: Path, tmp_path: Path) -> None:
    folders = {"train_dir": photos / "train", "validation_dir": photos / "validation"}
    out = [photos / "train" / "b" / "004.png", photos / "validation" / "c" / "101.png"]
    whole, data = load(**folders), load(**folders, exclude=_list(tmp_path / "list.txt", *out))
    for part, left_out in zip(("train", "validation"), out, strict=True):
        before, after = getattr(whole, part), getattr(data, part)
        assert names(after) == [name for name in names(before) if name != str(left_out)]
        assert classes_of(after, data.labels) == [Path(name).parent.name for name in names(after)]
    np.testing.assert_array_equal(np.asarray(data.train.image(15)), np.asarray(make_image(1, 5)))
    held_out = load(train_dir=photos / "train", exclude=tmp_path / "list.txt")
    assert len(held_out.train) + len(held_out.validation) == 26
    assert str(out[0]) not in names(held_out.train) + names(held_out.validation)
    settings = DataSettings(validation_dir=str(photos / "validation"), exclude=str(tmp_path / "list.txt"))
    assert names(load_validation(settings, 0, data.labels)) == names(data.validation)


def test_what_is_left_out_changes_the_fingerprint_whichever_file_it_is(tmp_path: Path) -> None:
    """Of a large split the fingerprint reads a few names alone."""
    make_folder(tmp_path / "train", classes=("a", "b"), per_class=100)

    def fingerprint(*left_out: int) -> str:
        exclude = _list(tmp_path / "list.txt", *(tmp_path / "train" / "a" / f"{number:03d}.png" for number in left_out))
        data = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "train", exclude=exclude)
        return data.train.fingerprint()

    prints = [fingerprint(number) for number in range(50, 60)]
    whole = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "train").train.fingerprint()
    assert len({whole, *prints}) == 11
    assert fingerprint() == whole
    assert fingerprint(50) == prints[0]


def test_a_list_fits_however_the_folder_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    exclude = _list(tmp_path / "list.txt", photos / "train" / "a" / "001.png", "train/../train/a/002.png")
    for name in ("train", "./train/", str(photos / "train")):
        data = load(train_dir=name, validation_dir="validation", exclude=exclude)
        assert counts(data.train, 3) == [9, 9, 7]


def test_listed_files_that_are_not_in_the_data_are_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {"train_dir": photos / "train", "validation_dir": photos / "validation"}
    here = (photos / "train" / "a" / "000.png", photos / "validation" / "a" / "100.png")
    load(**folders, exclude=_list(tmp_path / "list.txt", *here))
    assert caplog.text == ""
    load(**folders, exclude=_list(tmp_path / "list.txt", *here, "/gone/2.png", "/gone/1.png"))
    assert "2 of 4 files are not in the data, the first is /gone/1.png" in caplog.text


def test_a_name_that_is_not_utf8_is_named_and_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "data", classes=("a", "b"), per_class=3)
    odd = tmp_path / "data" / "a" / os.fsdecode(b"caf\xe9.png")
    make_image(0, 9).save(odd)
    message = refusal(train_dir=tmp_path / "data")
    assert f"{tmp_path}/data/a/caf\\xe9.png" in message
    assert "rename" in message
    assert "--exclude" in message
    write_exclusions(tmp_path / "list.txt", [Section("odd", [str(odd)])])
    data = load(train_dir=tmp_path / "data", exclude=tmp_path / "list.txt")
    assert sorted(names(data.train) + names(data.validation)) == sorted(
        str(tmp_path / "data" / name / f"00{number}.png") for name in "ab" for number in range(3)
    )
    settings = DataSettings(validation_dir=str(tmp_path / "data"), exclude=str(tmp_path / "list.txt"))
    assert len(load_validation(settings, 0, data.labels)) == 6
    assert caplog.text == ""


def test_a_class_of_which_nothing_is_left_is_named(photos: Path, tmp_path: Path) -> None:
    exclude = _list(tmp_path / "list.txt", *(photos / "validation" / "b").iterdir())
    folders = {"train_dir": photos / "train", "validation_dir": photos / "validation"}
    assert "without a single validation image: b" in refusal(**folders, exclude=exclude)


def test_a_class_that_training_lacks_may_be_left_out_of_validation(photos: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "validation", classes=("a", "b", "c", "x"), per_class=1)
    folders = {"train_dir": photos / "train", "validation_dir": tmp_path / "validation"}
    assert "training data lacks: x" in refusal(**folders)
    exclude = _list(tmp_path / "list.txt", tmp_path / "validation" / "x" / "000.png")
    assert load(**folders, exclude=exclude).labels == ["a", "b", "c"]


# Data sets


def _features(label: Any) -> Features:
    return Features({"image": Image(), "label": label})


def _cells(labels: list[int]) -> list[Any]:
    return [make_image(label, number) for number, label in enumerate(labels)]


def _table(labels: list[int], **more: Any) -> Dataset:
    return Dataset.from_dict(
        {"image": _cells(labels), "label": labels, **more}, features=_features(ClassLabel(names=["cat", "dog", "eel"]))
    )


LABELS = [0, 1, 2] * 4


def test_a_directory_of_parquet_files_is_a_data_set(tmp_path: Path) -> None:
    _table(LABELS).to_parquet(tmp_path / "train.parquet")
    _table([2, 1, 0]).to_parquet(tmp_path / "test.parquet")
    data = load(dataset_name=tmp_path, validation_split="test")
    assert data.labels == ["cat", "dog", "eel"]
    assert data.train.labels.tolist() == LABELS
    assert data.validation.labels.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(np.asarray(data.train.image(4)), np.asarray(make_image(1, 4)))
    assert data.train.name(4) == "row 4"
    sliced = load(dataset_name=tmp_path, train_split="train[:9]", train_val_split=0.3)
    assert (counts(sliced.train, 3), counts(sliced.validation, 3)) == ([2, 2, 2], [1, 1, 1])
    assert "corresponds to no data" in refusal(dataset_name=tmp_path, train_split="train[:0]")


def test_a_directory_of_class_folders_by_split_is_a_data_set_too(photos: Path) -> None:
    """The `imagefolder` of `datasets`; it says the same as the two folders given one by one."""
    data = load(dataset_name=photos, validation_split="validation")
    folders = load(train_dir=photos / "train", validation_dir=photos / "validation")
    assert data.labels == folders.labels
    assert classes_of(data.train, data.labels) == [Path(name).parent.name for name in names(data.train)]
    assert sorted(names(data.train)) == sorted(names(folders.train))


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(12)),
        ("train[:5]", range(5)),
        ("train[7:]", range(7, 12)),
        ("train[2:9]", range(2, 9)),
        ("train[-6:]", range(6, 12)),
        ("train[:-3]", range(9)),
        ("train[:99]", range(12)),
    ],
)
def test_a_data_set_saved_to_disk_takes_slices(split: str, rows: range, tmp_path: Path) -> None:
    DatasetDict({"train": _table(LABELS), "test": _table([0, 1, 2])}).save_to_disk(tmp_path)
    data = load(dataset_name=tmp_path, train_split=split, validation_split="test", allow_missing_classes=True)
    assert data.train.labels.tolist() == [LABELS[row] for row in rows]
    np.testing.assert_array_equal(np.asarray(data.train.image(0)), np.asarray(make_image(LABELS[rows[0]], rows[0])))
    assert data.train.name(1) == f"row {1}"


def test_one_table_saved_to_disk_is_the_training_split(tmp_path: Path) -> None:
    _table(LABELS).save_to_disk(tmp_path)
    data = load(dataset_name=tmp_path, train_val_split=0.25)
    assert (counts(data.train, 3), counts(data.validation, 3)) == ([3, 3, 3], [1, 1, 1])
    assert "has no split 'test'; it has train" in refusal(dataset_name=tmp_path, train_split="test")


@pytest.mark.parametrize("split", ["train[:50%]", "train[3]", "train[a:b]", "train[1:2:3]", "train[--1:]"])
def test_a_slice_that_is_not_understood_is_refused(split: str, tmp_path: Path) -> None:
    _table(LABELS).save_to_disk(tmp_path)
    assert split in refusal(dataset_name=tmp_path, train_split=split)


@pytest.mark.parametrize("kind", ["images", "paths"])
def test_an_empty_selection_is_refused(kind: str, tmp_path: Path) -> None:
    table = _table(LABELS) if kind == "images" else Dataset.from_dict({"image": ["a.png"], "label": [0]})
    table.save_to_disk(tmp_path / "saved")
    message = refusal(dataset_name=tmp_path / "saved", train_split="train[:0]")
    assert "0 training and 0 validation images: both need some" in message


def test_a_data_set_that_is_nowhere_and_a_split_that_it_lacks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"data set '{tmp_path / 'none'}'" in refusal(dataset_name=tmp_path / "none")
    _table(LABELS).to_parquet(tmp_path / "train.parquet")
    message = refusal(dataset_name=tmp_path, train_split="nothing")
    assert "split 'nothing'" in message
    assert "train" in message.partition("Error")[2]


# Columns and labels


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_validation_split_that_is_not_used_is_told(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    splits = DatasetDict({"train": _table(LABELS), "valid": _table(LABELS)})
    if form == "saved":
        splits.save_to_disk(tmp_path)
    else:
        for name, table in splits.items():
            table.to_parquet(tmp_path / f"{name}-00000.parquet")
    name = "valid" if form == "saved" else "validation"  # the name that `datasets` gives to such files
    with caplog.at_level("INFO"):
        load(dataset_name=tmp_path)
    assert f"a split {name}, which is not used: --validation_split {name} validates on it" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        load(dataset_name=tmp_path, validation_split=name)
        load(dataset_name=tmp_path, test_split=name)
        if form == "parquet":
            load(dataset_name=tmp_path, train_split=f"train+{name}[:9]")
    assert "which is not used" not in caplog.text


def _saved(directory: Path, columns: dict[str, Any], features: Features | None = None) -> Path:
    Dataset.from_dict(columns, features=features).save_to_disk(directory)
    return directory


def test_string_labels_are_numbered_in_lexicographic_order(tmp_path: Path) -> None:
    labels = ["10", "9", "pear", "9", "10", "pear"]
    _saved(tmp_path, {"image": _cells([0] * 6), "label": labels}, _features(Value("string")))
    data = load(dataset_name=tmp_path, train_val_split=0.5)
    assert data.labels == ["10", "9", "pear"]
    assert sorted(data.train.labels.tolist()) == [0, 1, 2]
    row = data.train.table_rows[0]
    assert data.labels[data.train.labels[0]] == labels[row]


def test_whole_numbers_as_labels_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    """Without a gap: a class is a place in the label map, and its name is the number."""
    _saved(tmp_path, {"image": _cells([0] * 6), "label": [10, 9, 2, 9, 10, 2]}, _features(Value("int64")))
    data = load(dataset_name=tmp_path, train_val_split=0.5)
    assert data.labels == ["2", "9", "10"]
    assert set(data.train.labels) == {0, 1, 2}


def test_validation_is_numbered_by_the_names_of_training(tmp_path: Path) -> None:
    """The two splits have their classes in different orders, and one of them has names alone."""
    train, test = ClassLabel(names=["cat", "dog"]), ClassLabel(names=["dog", "cat"])
    tables = {
        "train": Dataset.from_dict({"image": _cells([0, 1]), "label": [0, 1]}, features=_features(train)),
        "test": Dataset.from_dict({"image": _cells([0, 1]), "label": [0, 1]}, features=_features(test)),
        "named": Dataset.from_dict(
            {"image": _cells([0, 1]), "label": ["dog", "cat"]}, features=_features(Value("string"))
        ),
    }
    for name, table in tables.items():
        table.save_to_disk(tmp_path / name)
    settings = DataSettings(dataset_name=str(tmp_path / "test"), validation_split="train")
    assert load_validation(settings, 0, ["cat", "dog"]).labels.tolist() == [1, 0]
    settings = DataSettings(dataset_name=str(tmp_path / "named"), validation_split="train")
    assert load_validation(settings, 0, ["cat", "dog"]).labels.tolist() == [1, 0]


@pytest.mark.parametrize("lists", [False, True])
def test_parquet_files_that_number_their_classes_differently_are_refused(lists: bool, tmp_path: Path) -> None:
    """As of folders that were loaded one by one, where one lacks a class. `datasets` keeps the names of the first."""
    for split, classes in (("train", ["cat", "dog", "eel"]), ("validation", ["cat", "eel"]), ("test", ["cat", "dog"])):
        feature: Any = ClassLabel(names=classes)
        labels: list[Any] = [0, 1] * 3
        if lists:
            feature, labels = List(feature), [[label] for label in labels]
        content = {"image": _cells([0] * 6), "label": labels}
        Dataset.from_dict(content, features=_features(feature)).to_parquet(tmp_path / f"{split}.parquet")
    several = {"problem_type": "multi_label_classification"} if lists else {}
    message = refusal(dataset_name=tmp_path, validation_split="validation", allow_missing_classes=True, **several)
    assert message.startswith(f"{tmp_path / 'validation.parquet'}: in column label, 1 is eel in this file, and dog in ")
    # Fewer classes are none of other numbers.
    data = load(dataset_name=tmp_path, validation_split="test", allow_missing_classes=True, **several)
    assert len(data.validation) == 6


@pytest.mark.parametrize(("labels", "kind"), [([b"a", b"b"] * 2, "bytes"), ([datetime(2026, 1, 1)] * 4, "datetime")])
def test_labels_that_are_no_numbers_or_text_are_refused(labels: list[Any], kind: str, tmp_path: Path) -> None:
    _saved(tmp_path, {"image": _cells([0] * 4), "label": labels})
    assert f"row 0 has a label of type {kind} in column label" in refusal(dataset_name=tmp_path)


def test_a_damaged_file_of_a_data_set_is_told_with_its_cause(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000.tar", [(make_png(0, number), number % 2) for number in range(8)])
    (tmp_path / "train-001.tar").write_bytes(b"")
    assert "ReadError: empty file" in refusal(dataset_name=tmp_path)


def test_columns_of_other_names_are_found_by_type_or_named(tmp_path: Path) -> None:
    features = Features({"img": Image(), "fine": ClassLabel(names=["x", "y"]), "coarse": ClassLabel(names=["z"])})
    columns = {"img": _cells([0] * 6), "fine": [0, 1] * 3, "coarse": [0] * 6}
    _saved(tmp_path, columns, features)
    message = refusal(dataset_name=tmp_path)
    assert "--label_column_name: img, fine, coarse" in message
    data = load(dataset_name=tmp_path, label_column_name="fine")
    assert data.labels == ["x", "y"]
    assert data.train.column == "img"
    assert load(dataset_name=tmp_path, label_column_name="coarse").labels == ["z"]


def test_the_usual_name_wins_among_several_label_columns(tmp_path: Path) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["x", "y"]), "coarse": ClassLabel(names=["z"])})
    _saved(tmp_path, {"image": _cells([0] * 4), "label": [0, 1] * 2, "coarse": [0] * 4}, features)
    assert load(dataset_name=tmp_path).labels == ["x", "y"]


@pytest.mark.parametrize(
    ("label", "other"),
    [(Value("string"), ("split", ClassLabel(names=["x", "y"]))), (Value("string"), ("labels", Value("string")))],
)
def test_no_label_column_is_chosen_by_chance(label: Any, other: tuple[str, Any], tmp_path: Path) -> None:
    features = Features({"image": Image(), "label": label, other[0]: other[1]})
    _saved(tmp_path, {"image": _cells([0] * 4), "label": ["x", "y"] * 2, other[0]: ["x", "y"] * 2}, features)
    message = refusal(dataset_name=tmp_path)
    assert message.startswith(f"columns label, {other[0]} of labels in the data set; name one with --label_column_name")
    assert load(dataset_name=tmp_path, label_column_name="label").labels == ["x", "y"]


@pytest.mark.parametrize("other", ["cat ", " cat", "cat\u200b", "c\u0061\u0301t"])
def test_class_names_that_look_the_same_are_refused(other: str, tmp_path: Path) -> None:
    name = "cát" if "\u0301" in other else "cat"
    _saved(tmp_path / "table", {"image": _cells([0] * 4), "label": [name, other] * 2}, _features(Value("string")))
    make_folder(tmp_path / "train", classes=(name, "dog"), per_class=2)
    make_folder(tmp_path / "both", classes=(name, other), per_class=2)
    make_folder(tmp_path / "validation", classes=(other, "dog"), per_class=2)
    for settings in (
        {"dataset_name": tmp_path / "table"},
        {"train_dir": tmp_path / "both"},
        {"train_dir": tmp_path / "train", "validation_dir": tmp_path / "validation"},
    ):
        message = refusal(**settings)
        assert message.startswith("class names that look the same")
        assert ascii(name) in message
        assert ascii(other) in message
    with pytest.raises(UserError, match="class names that look the same"):
        audit(AuditSettings(data=AuditData(train_dir=str(tmp_path / "both"))))


def test_a_line_break_after_a_label_is_no_part_of_its_class(tmp_path: Path) -> None:
    """As in .txt files of tar archives, by splits and rows."""
    for name, cat in (("table", "cat\n"), ("other", " cat")):
        _saved(tmp_path / name, {"image": _cells([0] * 4), "label": [cat, "dog\n"] * 2}, _features(Value("string")))
    data = load(dataset_name=tmp_path / "table")
    assert (data.labels, counts(data.train, 2)) == (["cat", "dog"], [1, 1])
    other = load_validation(
        DataSettings(dataset_name=str(tmp_path / "other"), validation_split="train"), 0, data.labels
    )
    assert other.labels.tolist() == [0, 1, 0, 1]


def test_several_image_columns_have_to_be_told_apart(tmp_path: Path) -> None:
    features = Features({"left": Image(), "right": Image(), "label": ClassLabel(names=["x", "y"])})
    _saved(tmp_path, {"left": _cells([0] * 4), "right": _cells([1] * 4), "label": [0, 1] * 2}, features)
    message = refusal(dataset_name=tmp_path)
    assert "columns left, right" in message
    assert "--image_column_name" in message
    data = load(dataset_name=tmp_path, image_column_name="right")
    np.testing.assert_array_equal(
        np.asarray(data.train.image(0)), np.asarray(make_image(1, int(data.train.table_rows[0])))
    )


@pytest.mark.parametrize("setting", ["image_column_name", "label_column_name"])
def test_a_column_that_is_not_there_is_answered_with_those_that_are(setting: str, tmp_path: Path) -> None:
    _table(LABELS).save_to_disk(tmp_path)
    assert f"--{setting} none: the data set has image, label" in refusal(dataset_name=tmp_path, **{setting: "none"})


def test_a_data_set_without_images_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path, {"text": ["a", "b"], "label": [0, 1]})
    assert "no column of images" in refusal(dataset_name=tmp_path)


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0, -1, 1, None], ClassLabel(names=["x", "y"])),
        ([0, None, 1, -1], Value("int64")),
        ([0.0, float("nan"), 1.0, float("nan")], Value("float32")),
        (["x", "", "y", " \t"], Value("string")),
        (["x", "\u200b", "y", None], Value("string")),
        ([datetime(2026, 1, 1), None, datetime(2026, 1, 2), None], Value("timestamp[s]")),
    ],
)
def test_samples_without_a_label_are_refused(labels: list[Any], kind: Any, tmp_path: Path) -> None:
    """-1 is what the test splits of many data sets have instead of a label."""
    _saved(tmp_path, {"image": _cells([0] * 4), "label": labels}, _features(kind))
    message = refusal(dataset_name=tmp_path, on_bad_image="skip")
    assert message.startswith("split train: 2 of 4 rows have no label in column label, counted from 0: row 1 (")
    assert message.endswith("including none, add --problem_type multi_label_classification.")
    assert ", row 3 (" in message


def test_an_index_of_no_class_is_no_label(tmp_path: Path) -> None:
    table = _table(LABELS).cast_column("label", Value("int64"))
    schema = _table(LABELS).features.arrow_schema
    rows = table.data.table.set_column(1, "label", [[*LABELS[:-1], 3]]).replace_schema_metadata(schema.metadata)
    pq.write_table(rows, tmp_path / "train.parquet")
    assert "row 11 (3)" in refusal(dataset_name=tmp_path)


def test_a_column_of_paths_is_a_column_of_images(photos: Path, tmp_path: Path) -> None:
    files = sorted(map(str, (photos / "train").rglob("*.png")))
    _saved(tmp_path, {"image": files, "label": [Path(file).parent.name for file in files]})
    data = load(dataset_name=tmp_path)
    assert data.labels == ["a", "b", "c"]
    assert data.train.image(0).size == (40, 32)
    assert data.train.name(0) == files[data.train.table_rows[0]]


def test_a_second_column_of_images_is_left_alone(tmp_path: Path) -> None:
    """Decoding it for each sample would take time, and a broken image in it would end the run."""
    rubbish = [{"bytes": b"rubbish", "path": None}] * 4
    features = Features({"mask": Image(), "image": Image(), "label": ClassLabel(names=["x", "y"])})
    _saved(tmp_path, {"mask": rubbish, "image": _cells([0] * 4), "label": [0, 1] * 2}, features)
    assert load(dataset_name=tmp_path, image_column_name="image").train.image(0).size == (40, 32)


def test_images_are_decoded_one_by_one_as_they_are_asked_for(tmp_path: Path) -> None:
    """A broken image does not stop a data set from loading, and is named when it is its turn."""
    make_folder(tmp_path, classes=("a", "b"), per_class=4)
    (tmp_path / "a" / "000.png").write_bytes(b"broken")
    data = load(train_dir=tmp_path, validation_dir=tmp_path)
    assert data.train.image(1).mode == "RGB"
    with pytest.raises(UnreadableImageError, match=r"a/000\.png"):
        data.train.image(0)


# Validation for a trained model


def test_a_validation_folder_is_numbered_by_the_model(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("b", "c"), per_class=2)
    split = load_validation(DataSettings(validation_dir=str(tmp_path)), 0, ["c", "x", "b"])
    assert split.labels.tolist() == [2, 2, 0, 0]
    with pytest.raises(UserError, match="lacks: c"):
        load_validation(DataSettings(validation_dir=str(tmp_path)), 0, ["a", "b"])


def test_the_hold_out_of_training_is_found_again_for_a_model(photos: Path) -> None:
    settings = DataSettings(train_dir=str(photos / "train"))
    split = load_validation(settings, 42, ["a", "b", "c"])
    assert names(split) == names(load_data(settings, 42).validation)
    with pytest.raises(UserError, match="the model"):
        load_validation(settings, 42, ["c", "b", "a"])


def test_a_validation_split_is_numbered_by_the_model_and_limited(tmp_path: Path) -> None:
    DatasetDict({"train": _table(LABELS), "test": _table(LABELS)}).save_to_disk(tmp_path)
    settings = DataSettings(dataset_name=str(tmp_path), validation_split="test", max_eval_samples=5)
    split = load_validation(settings, 0, ["eel", "dog", "cat"])
    assert split.labels.tolist() == [2 - LABELS[row] for row in split.table_rows]
    assert len(split) == 5
    settings = DataSettings(dataset_name=str(tmp_path), validation_split="test[:0]")
    with pytest.raises(UserError, match="0 validation images"):
        load_validation(settings, 0, ["eel", "dog", "cat"])


def test_several_labels_a_sample_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path, {"image": _cells([0, 0]), "label": [[0], [0, 1]]}, _features([Value("int64")]))
    message = refusal(dataset_name=tmp_path)
    assert "column label holds List, not one label per sample" in message
    assert "--label_column_name: image, label" in message


def test_names_without_images_stay_in_the_label_map(tmp_path: Path) -> None:
    """The PEFT guide's recipe trains 101 outputs on images of 7 classes."""
    kind = ClassLabel(names=["v", "w", "x", "y", "z"])
    _saved(tmp_path, {"image": _cells([0] * 10), "label": [3, 1] * 5}, _features(kind))
    data = load(dataset_name=tmp_path)
    assert data.labels == ["v", "w", "x", "y", "z"]
    assert set(data.train.labels.tolist()) == set(data.validation.labels.tolist()) == {1, 3}


def test_an_empty_class_folder_that_training_lacks_shifts_no_number(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", classes=("b", "c"), per_class=2)
    make_folder(tmp_path / "validation", classes=("b", "c"), per_class=1)
    (tmp_path / "validation" / "a").mkdir()
    data = load(train_dir=tmp_path / "train", validation_dir=tmp_path / "validation")
    assert data.labels == ["b", "c"]
    assert data.validation.labels.tolist() == [0, 1]


@pytest.mark.parametrize("target", ["a", "."])
@pytest.mark.timeout(30)
def test_a_link_back_to_a_folder_above_is_not_followed(target: str, tmp_path: Path) -> None:
    """It would give each image many times over, in training and validation, and one to the root without an end."""
    make_folder(tmp_path, classes=("a", "b"), per_class=2)
    for name in ("x", "y"):
        (tmp_path / "a" / name).symlink_to(tmp_path / target)
    assert counts(load(train_dir=tmp_path, validation_dir=tmp_path).train, 2) == [2, 2]


@pytest.mark.timeout(30)
def test_two_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("a", "b"), per_class=2)
    (tmp_path / "a" / "x").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "x").symlink_to(tmp_path / "a")
    assert counts(load(train_dir=tmp_path, validation_dir=tmp_path).train, 2) == [4, 4]
