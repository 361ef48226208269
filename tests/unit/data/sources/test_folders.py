"""Folders of images: which folders are classes, and which files are their images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lora_dist_testing import unprivileged
from lora_dist_testing.tiny import make_folder, make_image

from lora_dist.audit.audit import audit
from lora_dist.data.sources.load import load_data
from lora_dist.deployment.inputs import find_images
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
    make_folder(tmp_path / "__MACOSX", classes=("cat",), per_class=1)
    words = " ".join(f"--{flag} {tmp_path / above / name}" for flag, name in (pair.split() for pair in flags))
    for message in refusals(train_dir=tmp_path):
        assert message.startswith(f"--train_dir {tmp_path}: ")
        assert message.endswith(f"use {words}")


def test_splits_beside_another_folder_or_without_training_data_are_no_classes(tmp_path: Path) -> None:
    for name in ("more/train", "more/val", "more/unlabeled", "tests/val", "tests/test"):
        make_folder(tmp_path / name, classes=("cat", "dog"), per_class=2)
    more, tests = tmp_path / "more", tmp_path / "tests"
    assert refusals(train_dir=more) == {
        f"--train_dir {more}: its folders train, val are splits, not classes; use --train_dir {more / 'train'} "
        f"--validation_dir {more / 'val'}"
    }
    assert refusals(train_dir=tests) == {
        f"--train_dir {tests}: its folders test, val are splits, not classes; set --train_dir to the folder with the "
        f"class folders"
    }


@pytest.mark.parametrize(
    ("classes", "advice"),
    [
        (("cat/train", "cat/val", "dog/train", "dog/val"), "If these are splits, move them outside the class folders"),
        (("2023/cat", "2023/dog", "2024/cat", "2024/dog"), "If these are the classes, name one of the folders"),
        (("cat/left", "dog/left", "dog/right"), ""),
    ],
)
def test_class_folders_with_the_same_folders_are_told(
    classes: tuple[str, ...], advice: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, classes=classes, per_class=2)
    load_data(DataSettings(train_dir=str(tmp_path)), 42)
    assert (advice in caplog.text) if advice else not caplog.text


def test_a_split_among_the_classes_is_none_of_them(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("cat", "dog", "val/cat", "val/dog"), per_class=2)
    for message in refusals(train_dir=tmp_path):
        assert message == (
            f"--train_dir {tmp_path}: its folder val is a split with the classes of the others, not a class; move it "
            f"to another place, or list it for --exclude"
        )
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'val'}\n")
    settings = DataSettings(train_dir=str(tmp_path), exclude=str(tmp_path / "list.txt"))
    assert load_data(settings, 42).labels == ["cat", "dog"]


def test_a_folder_of_images_beside_a_split_is_no_class(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("train/cat", "train/dog", "new"), per_class=2)
    for message in refusals(train_dir=tmp_path):
        assert message.endswith(
            f"its folder train contains class folders; these do not: new; use --train_dir {tmp_path / 'train'}"
        )


@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "val", "more"), ("train",)])
def test_splits_without_class_folders_beside_a_file_of_labels_are_no_classes(
    splits: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the archives of competitions. Without the file, it is said that they are taken for classes."""
    make_folder(tmp_path, classes=splits, per_class=3)
    load_data(DataSettings(train_dir=str(tmp_path)), 42)
    named = "is named as a split" if len(splits) == 1 else "are named as splits"
    assert f"{named}; the names of folders are taken for classes" in caplog.text
    for name in ("sample_submission.csv", "train.csv"):
        (tmp_path / name).write_text("id,label\n")
    advice = f"--train_dir {tmp_path / splits[0]} --labels_file {tmp_path / 'train.csv'}"
    for message in refusals(train_dir=tmp_path):
        assert f"{named}, not as classes; name the folder and the file of its labels: {advice}. Otherwise, " in message


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


# Folders that are no classes


SYSTEM = (
    ".ipynb_checkpoints",
    "__MACOSX",
    "@eaDir",
    ".Trash-1000",
    "#recycle",
    "lost+found",
    "System Volume Information",
    ".thumbnails",
    ".AppleDouble",
    "$RECYCLE.BIN",
)


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_systems_are_skipped_and_said(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, classes=("cat", "dog", name, f"cat/{name}", f"dog/deep/{name}/cat"), per_class=2)
    data = load_data(DataSettings(train_dir=str(tmp_path), train_val_split=0.5), 42)
    assert data.labels == ["cat", "dog"]
    assert len(data.train) + len(data.validation) == 4
    assert f"{tmp_path}: not read as images: folders of the system or an archive: 3" in caplog.text
    report = audit(AuditSettings(data=AuditData(train_dir=str(tmp_path))))
    assert report.classes == ["cat", "dog"]
    said = [finding.message for finding in report.findings if finding.kind.name == "ignored"]
    found = ", ".join(sorted((name, f"cat/{name}", f"dog/deep/{name}")))
    assert said == [f"train: folders of the system or an archive: 3, e.g. {found}"]
    caplog.clear()
    assert len(find_images([str(tmp_path)])) == 4
    assert "folders of the system or an archive: 3" in caplog.text


def test_a_folder_of_a_system_need_not_be_readable(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("cat", "dog", "lost+found", "cat/@eaDir"), per_class=2)
    for closed in ("lost+found", "cat/@eaDir"):
        (tmp_path / closed).chmod(0)
    code = "import sys; from lora_dist.data.sources.folders import read_class_folders; read_class_folders(sys.argv[1])"
    try:
        done = subprocess.run(unprivileged.python("-c", code, tmp_path), capture_output=True, text=True, check=False)
    finally:
        for closed in ("lost+found", "cat/@eaDir"):
            (tmp_path / closed).chmod(0o700)
    assert (done.returncode, done.stderr) == (0, "")


def test_listed_folders_are_left_out_and_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "data", classes=("cat", "cat/blurred", "dog", "unsorted"), per_class=2)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{tmp_path}/data/unsorted/\n{tmp_path}/data/cat/blurred\n{tmp_path}/data/dog/000.png\n")
    settings = {"train_dir": str(tmp_path / "data"), "exclude": str(listed)}
    data = load_data(DataSettings(**settings, train_val_split=0.5, allow_missing_classes=True), 42)
    assert data.labels == ["cat", "dog"]
    assert len(data.train) + len(data.validation) == 3
    assert caplog.text == ""
    report = audit(AuditSettings(data=AuditData(**settings)))
    assert (report.classes, len(report.scanned.files)) == (["cat", "dog"], 3)


# Which files are images


def test_every_suffix_that_pillow_decodes_is_read(tmp_path: Path) -> None:
    formats = {".jpe": "JPEG", ".jp2": "JPEG2000", ".tga": "TGA", ".mpo": "MPO", ".pbm": "PPM", ".ICO": "ICO"}
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for suffix, name in formats.items():
            make_image(0, 0).save(tmp_path / label / f"1{suffix}", name)
    data = load_data(DataSettings(train_dir=str(tmp_path), validation_dir=str(tmp_path)), 42)
    assert {Path(data.train.name(index)).suffix for index in range(len(data.train))} == formats.keys()
    assert all(data.train.image(index).mode == "RGB" for index in range(len(data.train)))
    report = audit(AuditSettings(data=AuditData(train_dir=str(tmp_path))))
    assert not [facts for facts in report.scanned.facts if facts.fault]
    assert "wrong_extension" not in {finding.kind.name for finding in report.findings}
    assert len(find_images([str(tmp_path)])) == 2 * len(formats)


def test_files_without_a_suffix_are_read_by_their_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, classes=("cat", "dog"), per_class=2)
    make_image(0, 0).save(tmp_path / "cat" / "3fa9", "JPEG")
    (tmp_path / "cat" / "LICENSE").write_text("text")
    os.mkfifo(tmp_path / "cat" / "pipe")
    data = load_data(DataSettings(train_dir=str(tmp_path), validation_dir=str(tmp_path)), 42)
    assert [Path(data.train.name(index)).name for index in range(3)] == ["000.png", "001.png", "3fa9"]
    assert "files without a suffix: 2" in caplog.text
    assert str(tmp_path / "cat" / "3fa9") in find_images([str(tmp_path)])
    report = audit(AuditSettings(data=AuditData(train_dir=str(tmp_path))))
    assert [finding.message for finding in report.findings if finding.kind.name == "wrong_extension"] == []
    assert len(report.scanned.files) == 5


def test_heic_is_read_where_its_package_is_installed_and_named_otherwise(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    make_folder(tmp_path / "photos", classes=("cat", "dog"), per_class=2)
    for name in ("photo.heic", "photo.jpg"):
        heif.from_pillow(make_image(0, 0)).save(tmp_path / "photos" / "cat" / name)
    data = load_data(DataSettings(train_dir=str(tmp_path / "photos"), validation_dir=str(tmp_path / "photos")), 42)
    assert len(data.train) == 6
    assert all(data.train.image(index).mode == "RGB" for index in range(6))
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from lora_dist.audit.scan import scan\n"
        "from lora_dist.data.pixels.images import UnreadableImageError, load_rgb\n"
        "from lora_dist.deployment.inputs import find_images\n"
        "files = find_images([sys.argv[1]])\n"
        "print(len(files), scan(files[2]).message)\n"
        "try: load_rgb(files[2])\n"
        "except UnreadableImageError as error: print(error)"
    )
    command = [sys.executable, "-c", code, tmp_path / "photos"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    advice = "pip install 'lora_dist[heif]' reads HEIC images"
    assert result.stdout.splitlines() == [
        f"5 the content is a HEIC image; {advice}",
        f"{tmp_path / 'photos' / 'cat' / 'photo.jpg'}: the content is a HEIC image; {advice}",
    ]
    assert f".heic files: 1, e.g. {tmp_path / 'photos' / 'cat' / 'photo.heic'}. {advice}" in result.stderr


def test_what_pillow_cannot_decode_is_left_out_and_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, classes=("cat", "dog"), per_class=2)
    for name in ("a.pdf", "a.eps", "b.EPS", "a.wmf", "a.mpg", "a.h5", "a.grib", "README"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    make_image(0, 0).save(tmp_path / "stray.png")
    kinds = (
        ".eps files: 2",
        ".grib files: 1",
        ".h5 files: 1",
        ".mpg files: 1",
        ".pdf files: 1",
        ".wmf files: 1",
        "files without a suffix: 1",
    )
    load_data(DataSettings(train_dir=str(tmp_path), train_val_split=0.5), 42)
    assert len(caplog.records) == 1
    assert all(kind in caplog.text for kind in (*kinds, "images outside of class folders: 1, e.g."))
    report = audit(AuditSettings(data=AuditData(train_dir=str(tmp_path))))
    said = " ".join(finding.message for finding in report.findings if finding.kind.name == "ignored")
    assert all(kind in said for kind in (*kinds, "images outside of class folders: 1, e.g. stray.png"))
    caplog.clear()
    assert len(find_images([str(tmp_path)])) == 5
    assert len(caplog.records) == 1
    assert all(kind in caplog.text for kind in kinds)
