"""Columns by which metrics are taken apart, of files of labels and of data sets."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from lora_dist_testing.tiny import make_folder, make_image

from lora_dist.data.sources.load import load_data, load_validation
from lora_dist.data.sources.split import Split
from lora_dist.deployment.inputs import TableRows
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings, Settings
from lora_dist.settings.train_contradictions import contradictions


def test_columns_of_a_file_of_labels(tmp_path: Path) -> None:
    photos, table = make_folder(tmp_path / "photos", per_class=6), tmp_path / "labels.csv"
    lines = [f"{label}/{n:03d}.png,{label},{'' if n == 5 else n % 2},x{n}" for label in "abc" for n in range(6)]
    table.write_text("\n".join(["path,label,site,camera", *lines]))
    settings = {"train_dir": str(photos), "labels_file": str(table)}
    data = load_data(DataSettings(**settings, slice_columns=["camera", "site"]), seed=0)
    for index in range(len(data.validation)):
        number = int(Path(data.validation.name(index)).stem)
        assert data.validation.slices["camera"][index] == f"x{number}"
        assert data.validation.slices["site"][index] == ("(none)" if number == 5 else str(number % 2))
    with pytest.raises(UserError, match="no column cam of --slice_columns; the first line has path, label, site"):
        load_data(DataSettings(**settings, slice_columns=["cam"]), seed=0)
    table.write_text("\n".join(line.rpartition(",")[0].rpartition(",")[0] for line in lines))
    with pytest.raises(UserError, match="no column site"):
        load_data(DataSettings(**settings, slice_columns=["site"]), seed=0)


def test_columns_of_a_data_set(tmp_path: Path) -> None:
    columns = {
        "image": [make_image(n % 2, n) for n in range(20)],
        "label": [n % 2 for n in range(20)],
        "site": [n % 3 for n in range(20)],
        "name": [None if n == 0 else [n] for n in range(20)],
        "age": [float("nan") if n % 2 else 5.0 for n in range(20)],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table = table.cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    table = table.cast_column("site", datasets.ClassLabel(names=["north", "south", "west"]))
    datasets.DatasetDict({"train": table, "validation": table.select(range(9))}).save_to_disk(tmp_path / "data")
    settings = {"dataset_name": str(tmp_path / "data")}
    held_out = load_data(DataSettings(**settings, slice_columns=["site", "age"]), seed=0).validation
    sites = ["north", "south", "west"]
    assert held_out.slices["site"].tolist() == [sites[row % 3] for row in held_out.table_rows]
    assert held_out.slices["age"].tolist() == ["(none)" if row % 2 else "5.0" for row in held_out.table_rows]
    assert held_out.names() == [f"row {row}" for row in held_out.table_rows]
    split = DataSettings(**settings, validation_split="validation", slice_columns=["site"])
    assert load_data(split, seed=0).validation.slices["site"].tolist() == sites * 3
    assert load_validation(split, 0, ["a", "b"]).slices["site"].tolist() == sites * 3
    for column, problem in (("camera", "the data set has image, label"), ("name", "does not hold one value")):
        with pytest.raises(UserError, match=problem):
            load_data(DataSettings(**settings, slice_columns=[column]), seed=0)


def test_rows_of_a_table_have_the_names_that_predict_gives_them(tmp_path: Path) -> None:
    images = []
    for number in range(4):
        make_image(0, number).save(tmp_path / "one.png")
        images.append({"bytes": (tmp_path / "one.png").read_bytes(), "path": f"{number}.png" if number else None})
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]})
    table = table.cast_column("image", datasets.Image(decode=False))
    split = Split(table, "image", np.arange(4), np.zeros(4, np.int64))
    assert split.names() == [image.name for image in TableRows(table, "image").read(range(4))]
    assert split.names()[:2] == ["row 0", "row 1 (1.png)"]


def test_wrong_combinations_are_named(tmp_path: Path) -> None:
    def problems(**settings: str) -> list[tuple[str, ...]]:
        data = DataSettings(**{"train_dir": ".", "slice_columns": ["site"], **settings})
        return [problem.names for problem in contradictions(Settings(data=data))]

    (tmp_path / "labels.csv").touch()
    assert ("slice_columns", "labels_file") in problems()
    assert ("slice_columns", "labels_file") in problems(train_dir="", validation_dir="."), "an evaluation alone"
    assert ("slice_columns", "validation_dir") in problems(labels_file=str(tmp_path / "labels.csv"), validation_dir=".")
