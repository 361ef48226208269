"""Labels in a text file: every form of it, all that is wrong at once, and groups that stay together."""

import unicodedata
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pytest
from lora_dist_testing.tiny import make_folder, make_image

from lora_dist.audit.audit import audit
from lora_dist.data.sources.labels_file import grouped_split, read_labels_file
from lora_dist.data.sources.load import ImageData, load_data, load_validation
from lora_dist.errors import UserError
from lora_dist.settings.audit import AuditData, AuditSettings
from lora_dist.settings.train import DataSettings, Settings
from lora_dist.settings.train_contradictions import contradictions


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images without class folders, some in folders."""
    for number in range(12):
        file = tmp_path / "photos" / ("deep/er" if number % 2 else ".") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        make_image(number % 3, number).save(file)
    return tmp_path / "photos"


def _path(number: int) -> str:
    return f"{'deep/er/' if number % 2 else ''}{number:02d}.png"


def _write(folder: Path, *lines: str, name: str = "labels.csv") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def _lines(delimiter: str = ",", count: int = 12) -> list[str]:
    return [f"{_path(number)}{delimiter}{'rose' if number < 8 else 'tulip'}" for number in range(count)]


def _load(photos: Path, **settings: str) -> ImageData:
    return load_data(DataSettings(train_dir=str(photos), labels_file=str(photos / "labels.csv"), **settings), 42)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["", "path,label", "Filename,Class", "\ufefffile_name,label"])
def test_every_form_of_the_file_gives_the_same(
    header: str, delimiter: str, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [header.replace(",", delimiter)] if header else []
    _write(photos, *lines, *_lines(delimiter))
    data = _load(photos)
    assert data.labels == ["rose", "tulip"]
    assert len(data.train) + len(data.validation) == 12
    assert sorted(np.concatenate([data.train.labels, data.validation.labels])) == [0] * 8 + [1] * 4
    assert caplog.text == ""


def test_columns_are_named_paths_may_lack_a_suffix_and_backslashes_are_folders(photos: Path) -> None:
    _write(photos, "x,subject;species", *(f"deep\\er\\{n:02d};{'rose' if n < 8 else 'tulip'}" for n in range(1, 12, 2)))
    with pytest.raises(UserError, match=r"line 1: x,subject \(if that is a header, name its columns"):
        _load(photos)
    with pytest.raises(UserError, match=r"no column of labels found; name it with .*: x,subject, species"):
        _load(photos, image_column_name="x,subject")
    with pytest.raises(UserError, match="no column other; the first line has x,subject, species"):
        _load(photos, image_column_name="other", label_column_name="species")
    named = {"image_column_name": "x,subject", "label_column_name": "species"}
    data = _load(photos, **named)
    assert len(data.train) + len(data.validation) == 6
    for split in ("validation", "test"):
        make_folder(photos.parent / split, classes=("rose", "tulip"), per_class=2)
    data = _load(photos, **named, **{f"{split}_dir": str(photos.parent / split) for split in ("validation", "test")})
    assert data.test is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 4, 4)


def test_everything_that_is_wrong_is_told_at_once(photos: Path) -> None:
    lines = _lines(count=10)
    lines += ["gone.png,rose", "also gone.png,rose", f"{_path(0)},tulip", f"{_path(1)},rose", f"{_path(11)},"]
    _write(photos, "path,label", *lines)
    with pytest.raises(UserError) as caught:
        _load(photos)
    assert str(caught.value).splitlines()[1:] == [
        "  files that do not exist: 2, e.g. line 12: gone.png; line 13: also gone.png",
        "  files listed twice with different values: 1, e.g. lines 2 and 14: 00.png",
        "  lines without a label (see --problem_type): 1, e.g. line 16: deep/er/11.png",
        "  files listed twice: 1, e.g. line 15: deep/er/01.png",
        f"  images that are not listed, and left out: 1, e.g. {photos / '10.png'}",
    ]


def test_absolute_paths_may_lead_through_other_links(photos: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(photos)
    for named, listed in ((link, photos), (photos, link)):
        _write(photos, *(f"{listed}/{line}" for line in _lines()))
        settings = DataSettings(train_dir=str(named), labels_file=str(photos / "labels.csv"))
        data = load_data(settings, 42)
        assert len(data.train) + len(data.validation) == 12
        assert data.train.name(0).startswith(str(named))


def test_a_label_that_is_no_text_is_missing(photos: Path) -> None:
    _write(photos, "path,label", *_lines()[:9], f"{_path(9)},nan", f"{_path(10)},NaN", f"{_path(11)},<NA>")
    with pytest.raises(UserError, match=r"lines without a label \(see --problem_type\): 3"):
        _load(photos)


def test_a_file_may_be_called_as_a_missing_value_is(photos: Path) -> None:
    make_image(0, 0).save(photos / "nan.jpg")
    _write(photos, "id,label", *_lines(), "nan,rose", "NaN,rose")
    with pytest.raises(UserError, match=r"files that do not exist: 1, e\.g\. line 15: NaN"):
        _load(photos)


def test_a_name_without_suffix_of_several_files_is_told(photos: Path) -> None:
    """Such as a photo and its mask."""
    make_image(0, 0).save(photos / "00.jpg")
    _write(photos, "id,label", "00,rose", "02,tulip")
    with pytest.raises(UserError, match=r"add the suffix\): 1, e\.g\. line 2: 00 is 00\.jpg, 00\.png"):
        _load(photos)


def test_a_label_that_may_mean_none_is_told(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(photos, "path,label", *_lines()[:8], *(f"{_path(number)},None" for number in (9, 10, 11)))
    assert _load(photos).labels == ["None", "rose"]
    assert "labels that are classes, unless you empty their cells: 3, e.g. line 10: None" in caplog.text


def test_numbers_with_leading_zeros_are_told(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in a table that a spreadsheet changed in part."""
    _write(photos, "path,label", *(f"{_path(number)},{('7', '007', 'a')[number % 3]}" for number in range(12)))
    assert _load(photos).labels == ["007", "7", "a"]
    assert "or in leading zeros: '007' and '7'" in caplog.text


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_accents_in_names_may_be_written_in_two_ways(
    forms: tuple[Literal["NFC", "NFD"], ...], suffix: str, photos: Path
) -> None:
    """As in archives that were made on macOS."""
    in_folder, in_file = (unicodedata.normalize(form, "caf\u00e9") for form in forms)
    make_image(0, 0).save(photos / f"{in_folder}.png")
    _write(photos, "path,label", *_lines(), f"{in_file}{suffix},tulip")
    listed = read_labels_file(str(photos), str(photos / "labels.csv"))
    assert str(photos / f"{in_folder}.png") in listed.paths
    if suffix:  # the name as it is written wins
        make_image(0, 1).save(photos / f"{in_file}.png")
        listed = read_labels_file(str(photos), str(photos / "labels.csv"))
        assert str(photos / f"{in_folder}.png") not in listed.paths


def test_a_number_is_the_same_class_with_and_without_decimals(photos: Path) -> None:
    _write(photos, "path,label", *(f"{_path(number)},{('1', '1.0', '2')[number % 3]}" for number in range(12)))
    with pytest.raises(UserError, match=r"in decimals: '1' and '1\.0'"):
        _load(photos)


def test_classes_that_differ_in_case_and_a_second_column_of_labels_are_told(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [f"{_path(number)},{('Rose', 'rose')[number % 2]},x" for number in range(12)]
    _write(photos, "path,label,class", *lines)
    assert _load(photos).labels == ["Rose", "rose"]
    assert "differ only in upper and lower case or in leading zeros: 'Rose' and 'rose'" in caplog.text
    assert "the labels are those of column label, not of class; --label_column_name" in caplog.text


def test_a_quote_that_is_not_closed_is_found(photos: Path) -> None:
    _write(photos, "path,label", f'"{_path(0)},a', *(f"{_path(1)},b" for _ in range(20_000)))
    with pytest.raises(UserError, match="is a quote before it not closed"):
        _load(photos)


@pytest.mark.parametrize(
    ("name", "said"), [("metadata.jsonl", "is --dataset_name FOLDER"), ("labels.xlsx", "save the table as")]
)
def test_other_tables_are_refused_with_the_way_out(name: str, said: str, photos: Path) -> None:
    (photos / name).write_bytes(b'{"path": "00.png", "label": "a"}\n' if name.endswith("l") else b"PK\x03\x04\xff")
    with pytest.raises(UserError, match=said):
        load_data(DataSettings(train_dir=str(photos), labels_file=str(photos / name)), 0)


def test_images_that_are_not_listed_are_left_out_with_a_word(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(photos, *(line for line in _lines() if not line.startswith("00")))
    data = _load(photos)
    assert len(data.train) + len(data.validation) == 11
    assert f"images that are not listed, and left out: 1, e.g. {photos / '00.png'}" in caplog.text


def test_a_column_of_splits_decides(photos: Path) -> None:
    splits = ["train", "Val", "test", "", "validation", "training"]
    lines = [f"{_path(number)},{'ab'[number // 6]},{splits[number % 6]}" for number in range(12)]
    _write(photos, "path,label,split", *lines)
    data = _load(photos)
    assert data.test is not None
    names = [[Path(split.name(index)).stem for index in range(len(split))] for split in (data.train, data.validation)]
    assert sorted(names[0]) == ["00", "03", "05", "06", "09", "11"]
    assert sorted(names[1]) == ["01", "04", "07", "10"]
    assert sorted(data.test.labels) == [0, 1]
    assert len(load_validation(DataSettings(train_dir=str(photos), labels_file=f"{photos}/labels.csv"), 0, "ab")) == 4
    report = audit(AuditSettings(data=AuditData(train_dir=str(photos), labels_file=str(photos / "labels.csv"))))
    assert report.counts()["train"] == report.counts()["validation"] == 6
    _write(photos, "path,label,split", *lines[:-1], lines[-1].replace("training", "somewhere"))
    with pytest.raises(UserError, match=r"unknown splits; .* and test: 1, e\.g\. line 13: somewhere"):
        _load(photos)


def test_the_audit_takes_the_columns_of_training(photos: Path) -> None:
    """A group in several splits is an error of both."""
    lines = [f"{_path(number)},{'ab'[number // 6]},{('train', 'val')[number % 2]},one" for number in range(12)]
    _write(photos, "path,label,split,clinic", *lines)
    file = str(photos / "labels.csv")
    with pytest.raises(UserError, match="groups in several splits: 1"):
        audit(AuditSettings(data=AuditData(train_dir=str(photos), labels_file=file, group_column_name="clinic")))
    with pytest.raises(UserError, match="groups in several splits: 1"):
        _load(photos, group_column_name="clinic")


def test_a_missing_value_is_no_value_of_any_column(photos: Path) -> None:
    """Images of unknown patients are not those of one patient called nan."""
    lines = [f"{line},nan,NaN,<NA>" for line in _lines()]
    file = _write(photos, "path,label,split,group,site", *lines)
    listed = read_labels_file(str(photos), str(file), slice_columns=("site",))
    assert (set(listed.splits), listed.groups, set(listed.slices["site"])) == ({"train"}, listed.paths, {""})


def test_groups_stay_on_one_side(photos: Path) -> None:
    lines = [f"{_path(number)},{'ab'[number % 2]},,{number // 3}" for number in range(12)]
    _write(photos, "path,label,split,patient", *lines)
    for share in (0.1, 0.4):
        data = load_data(
            DataSettings(train_dir=str(photos), labels_file=str(photos / "labels.csv"), train_val_split=share), 1
        )
        sides = [
            {int(Path(split.name(index)).stem) // 3 for index in range(len(split))}
            for split in (data.train, data.validation)
        ]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == (1 if share == 0.1 else 2)
    torn = [line.replace(",,0", f",{'train' if number else 'val'},0") for number, line in enumerate(lines)]
    _write(photos, "path,label,split,patient", *torn)
    with pytest.raises(UserError, match=r"groups in several splits: 1, e\.g\. 0: train, validation"):
        _load(photos)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ("path,label,group", "each of the 2 groups has a class that no other group has"),
        ("path,site,label", "no class has two images"),
    ],
)
def test_a_hold_out_that_is_not_possible_says_why(columns: str, reason: str, photos: Path) -> None:
    lines = (
        f"{_path(number)},{number % 2},{number % 2 if columns.endswith('group') else number}" for number in range(12)
    )
    _write(photos, columns, *lines)
    with pytest.raises(UserError, match=f"no image can be held out for validation, because {reason}"):
        _load(photos)


def test_grouped_splits_come_near_the_fraction_of_each_class_and_depend_on_the_seed() -> None:
    random = np.random.default_rng(0)
    groups = random.integers(0, 200, 2000).astype(str)
    labels = random.choice(4, 2000, p=[0.7, 0.2, 0.08, 0.02])
    kept, held_out = grouped_split(labels, groups.tolist(), 0.2, seed=1)
    assert sorted([*kept, *held_out]) == list(range(2000))
    assert not set(groups[kept]) & set(groups[held_out])
    shares = np.bincount(labels[held_out]) / np.bincount(labels)
    assert ((shares > 0.1) & (shares < 0.4)).all(), shares
    assert not np.array_equal(held_out, grouped_split(labels, groups.tolist(), 0.2, seed=2)[1])
    assert np.array_equal(held_out, grouped_split(labels, groups.tolist(), 0.2, seed=1)[1])


def test_the_metadata_of_an_image_folder_of_datasets_is_taken_as_it_is(photos: Path) -> None:
    _write(photos, "file_name,label,caption", *(f'{line},"one, two"' for line in _lines()), name="metadata.csv")
    listed = read_labels_file(str(photos), str(photos / "metadata.csv"))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train").cast_column(
        "image", datasets.Image(decode=False)
    )
    expected = {Path(row["image"]["path"]).name: row["label"] for row in theirs}
    ours = zip(listed.paths, listed.labels, strict=True)
    assert {Path(path).name: listed.classes[label] for path, label in ours} == expected


def test_a_file_beside_images_without_class_folders_is_named(photos: Path) -> None:
    for file in (photos / "deep" / "er").iterdir():
        file.unlink()
    (photos / "deep" / "er").rmdir()
    (photos / "deep").rmdir()
    file = _write(photos, *_lines(), name="train.csv")
    with pytest.raises(UserError, match=f"or name the file of their labels: --labels_file {file}"):
        load_data(DataSettings(train_dir=str(photos)), 0)
    _write(photos, "{}", name="metadata.jsonl")
    with pytest.raises(UserError, match=f"or use the labels of `datasets`: --dataset_name {photos}"):
        load_data(DataSettings(train_dir=str(photos)), 0)


def test_excluded_files_and_folders_are_neither_missing_nor_unlisted(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(photos, *_lines())
    (photos.parent / "list.txt").write_text(f"{photos / 'deep'}\n{photos / '00.png'}\n")
    data = _load(photos, exclude=str(photos.parent / "list.txt"))
    assert len(data.train) + len(data.validation) == 5
    assert caplog.text == ""


def test_wrong_combinations_are_named() -> None:
    wrong = Settings(data=DataSettings(dataset_name="x", labels_file=__file__, split_column_name="s"))
    assert "the file labels the images of a folder: set --train_dir" in [one.message for one in contradictions(wrong)]
    wrong = Settings(data=DataSettings(train_dir=".", group_column_name="patient"))
    assert "--group_column_name is a column of --labels_file: set it as well" in [
        one.message for one in contradictions(wrong)
    ]
