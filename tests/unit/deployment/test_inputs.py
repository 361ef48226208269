"""Lists of paths and rows of data sets as images to classify: which there are, their names, and their order."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image, config, load_dataset
from lora_dist_testing.tiny import make_folder, make_image, make_png, make_shards

from lora_dist.deployment.explain import file_of
from lora_dist.deployment.inputs import Files, Inputs, StreamedRows, TableRows, find_inputs, read_list
from lora_dist.errors import UserError
from lora_dist.settings.predict import DataSet, Images, PredictSettings

COUNTS = (5, 2, 4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _rows(directory: Path, **more: Any) -> Inputs:
    data = DataSet(dataset_name=str(directory), **{"dataset_split": "train"} | more)
    return find_inputs(PredictSettings(data=data))


def test_a_list_has_a_path_on_each_line_and_missing_files_stay(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "list.txt").write_bytes(b"a.png\r\n\n with spaces .png\nmissing.png\na.png\ncaf\xe9.png")
    expected = ["a.png", " with spaces .png", "missing.png", odd]
    assert read_list(str(tmp_path / "list.txt")) == expected
    make_image(0, 0).save(tmp_path / "b.png")
    both = Images(images=[str(tmp_path / "b.png")], images_from=str(tmp_path / "list.txt"))
    inputs = find_inputs(PredictSettings(images=both))
    assert isinstance(inputs, Files)
    assert inputs.paths == [str(tmp_path / "b.png"), *expected]


def test_a_file_under_several_spellings_is_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_folder(tmp_path / "photos", per_class=1).parent)
    (tmp_path / "photos" / "link.png").symlink_to("a/000.png")
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "folder").symlink_to(tmp_path / "elsewhere" / "a")
    make_image(0, 0).save(tmp_path / "elsewhere" / "link.png")
    (tmp_path / "list.txt").write_text(
        f"./photos/b/../c/000.png\n{tmp_path}/photos/a/000.png\ngone.png\n./gone.png\nphotos/folder/../link.png\n"
    )
    images = Images(images=["photos", "./photos/", f"{tmp_path}/photos/*/*.png"], images_from="list.txt")
    inputs = find_inputs(PredictSettings(images=images))
    assert isinstance(inputs, Files)
    assert inputs.paths == [f"photos/{name}" for name in ("link.png", *(f"{one}/000.png" for one in "abc"))] + [
        "gone.png",
        "photos/folder/../link.png",
    ]


def test_pictures_that_the_command_writes_are_no_images_of_the_same_command(tmp_path: Path) -> None:
    """Otherwise a prediction that was killed has other images when it is continued."""
    photos = make_folder(tmp_path / "photos", per_class=1)
    written = {"explain": str(photos / "maps"), "grid": str(photos / "grid.png")}
    images = Images(images=[str(photos), str(photos / "*.png")], **written)
    (photos / "maps").mkdir()
    for path in (file_of(photos / "maps", "a/000.png"), photos / "maps" / "own.png", photos / "grid.png"):
        make_image(0, 0).save(path)
    kept = [f"{photos}/{name}" for name in ("a/000.png", "b/000.png", "c/000.png", "maps/own.png")]
    inputs = find_inputs(PredictSettings(images=images))
    assert isinstance(inputs, Files)
    assert inputs.paths == kept
    beside = find_inputs(PredictSettings(images=Images(images=kept, explain=str(photos / "a"))))
    assert isinstance(beside, Files)
    assert beside.paths == kept
    with pytest.raises(UserError, match="--images has only pictures that --explain or --grid of this command write"):
        find_inputs(PredictSettings(images=Images(images=[str(photos / "grid.png")], **written)))


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b"\n \n", "names no file"), (b"\0", "text")])
def test_a_list_that_is_none_is_refused(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    with pytest.raises(UserError, match=f"--images_from {tmp_path}/list.*{words}"):
        read_list(str(tmp_path / "list"))


def test_names_and_their_order_are_the_identity_of_files() -> None:
    assert len({Files(paths).fingerprint() for paths in (["a", "b"], ["b", "a"], ["ab"], ["a"])}) == 4


@pytest.mark.parametrize("tar", [False, True], ids=["parquet", "tar"])
def test_rows_are_the_same_streamed_and_not_in_any_order(tar: bool, tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", COUNTS, tar=tar, rows_in_group=3)
    table, stream = _rows(data), _rows(data, streaming=True)
    assert isinstance(table, TableRows)
    assert isinstance(stream, StreamedRows)
    assert len(table) == len(stream) == sum(COUNTS)
    expected = [make_png(number % 3, number) for number in range(sum(COUNTS))]
    whole = range(sum(COUNTS))
    first = stream.read(whole)
    # Forward, over gaps, back, and in another process.
    for indices in (whole, [1, 3, 4, 9], [10, 0, 5], [2]):
        for inputs in (table, stream, pickle.loads(pickle.dumps(stream))):
            assert [image.source for image in inputs.read(indices)] == [expected[index] for index in indices]
        assert stream.read(indices) == [first[index] for index in indices]
    names = [image.name for image in first]
    assert names[6].startswith(f"train-00001-of-00003.{'tar' if tar else 'parquet'} row 1")
    assert table.read([6])[0].name.startswith("row 6")
    assert len(set(names)) == len({image.name for image in table.read(whole)}) == len(names)


def test_the_identity_of_rows_is_their_content(tmp_path: Path) -> None:
    one, other = (make_shards(tmp_path / name, counts) for name, counts in (("one", COUNTS), ("other", (5, 3, 4))))
    for streaming in (False, True):
        prints = [_rows(data, streaming=streaming).fingerprint() for data in (one, one, other)]
        assert prints[0] == prints[1] != prints[2]


def test_a_data_set_saved_to_disk_needs_no_labels_and_names_files_by_their_paths(tmp_path: Path) -> None:
    make_image(0, 0).save(tmp_path / "one.png")
    table = Dataset.from_dict({"photo": [str(tmp_path / "one.png"), str(tmp_path / "gone.png")], "note": ["x", "y"]})
    table.save_to_disk(tmp_path / "paths")
    table.select([0]).cast_column("photo", Image()).save_to_disk(tmp_path / "embedded")
    paths = _rows(tmp_path / "paths", image_column_name="photo")
    assert [image.name for image in paths.read([1, 0])] == [str(tmp_path / "gone.png"), str(tmp_path / "one.png")]
    assert [image.name for image in _rows(tmp_path / "embedded").read([0])] == ["row 0 (one.png)"]
    with pytest.raises(UserError, match="--image_column_name nope: the data set has photo, note"):
        _rows(tmp_path / "paths", image_column_name="nope")
    with pytest.raises(UserError, match="has no split 'test'"):
        _rows(tmp_path / "paths", dataset_split="test")
    with pytest.raises(UserError, match="has no rows"):
        _rows(tmp_path / "paths", dataset_split="train[:0]", image_column_name="photo")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", COUNTS)
    stream = _rows(data, streaming=True)
    shard = data / "train-00000-of-00003.parquet"
    load_dataset("parquet", data_files=str(shard), split="train[:3]").to_parquet(shard)
    assert len(stream.read([0, 1, 2])) == 3
    with pytest.raises(UserError, match=r"cannot read .*train-00000-of-00003.parquet row 3"):
        stream.read([3])
