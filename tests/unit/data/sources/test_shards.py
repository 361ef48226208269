"""Finding shards, the index of what they hold, and reading one from any row on."""

import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, config, load_dataset
from lora_dist_testing import unprivileged
from lora_dist_testing.tiny import make_png, make_shards, write_members, write_parquet, write_tar

from lora_dist.data.pixels.images import UnreadableImageError, from_cell, load_rgb
from lora_dist.data.sources import shards
from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.shards import find_source, load_alone, load_index
from lora_dist.data.sources.streaming import load_streamed
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings

COUNTS = (5, 2, 4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def streaming(directory: Path, **more: Any) -> DataSettings:
    return DataSettings(dataset_name=str(directory), streaming=True, validation_split="validation", **more)


@pytest.fixture(params=[False, True], ids=["parquet", "tar"])
def is_tar(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_the_index_tells_what_each_shard_holds(is_tar: bool, tmp_path: Path) -> None:
    source = find_source(streaming(make_shards(tmp_path / "data", COUNTS, tar=is_tar, rows_in_group=3)))
    index = load_index(source)
    assert [Path(file).stem for file in source.files] == [f"train-0000{position}-of-00003" for position in range(3)]
    assert index.labels == [0, 1, 2]
    if is_tar:
        assert (index.sizes.tolist(), index.files.tolist()) == ([5, 2, 4], [0, 1, 2])
    else:
        assert index.sizes.tolist() == [3, 2, 2, 3, 1]
        assert index.files.tolist() == [0, 0, 1, 2, 2]
        assert index.groups.tolist() == [0, 1, 0, 0, 1]
        assert index.first_rows.tolist() == [0, 3, 0, 0, 3]


def test_a_shard_that_numbers_its_classes_differently_is_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        table = Dataset.from_dict({"image": [make_png(0, 0)] * 2, "label": [0, 1]}, features=features)
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    with pytest.raises(UserError, match=r"^\S+train-00001-of-00002.parquet: in column label, 0 is dog in this file"):
        load_index(find_source(streaming(tmp_path / "data")))


def test_a_damaged_index_is_written_anew(tmp_path: Path, own_cache: Path) -> None:
    source = find_source(streaming(make_shards(tmp_path / "data", COUNTS)))
    before = load_index(source)
    (file,) = own_cache.rglob("lora_dist_shards/*.json")
    whole = file.read_text()
    for damaged in ("", whole[:20], "[]", '{"sizes": []}'):
        file.write_text(damaged)
        assert load_index(source).digest == before.digest
        assert file.read_text() == whole


@pytest.mark.parametrize(
    ("streamed", "foreign"),
    [
        (True, "directory"),
        (False, "lock"),
        pytest.param(False, "directory", marks=pytest.mark.slow),
        pytest.param(True, "lock", marks=pytest.mark.slow),
    ],
)
def test_a_cache_of_others_is_not_needed(streamed: bool, foreign: str, tmp_path: Path) -> None:
    data, cache, temporary = make_shards(tmp_path / "data", COUNTS), tmp_path / "home" / "datasets", tmp_path / "tmp"
    cache.mkdir(parents=True)
    temporary.mkdir()
    code = (
        "import sys; from lora_dist.data.sources import load, streaming; "
        "from lora_dist.settings.train import DataSettings; "
        f"settings = DataSettings(dataset_name=sys.argv[1], validation_split='validation', streaming={streamed}); "
        "print((streaming.load_streamed(settings, 0, 1) if settings.streaming else load.load_data(settings, 0)).labels)"
    )
    variables = {**os.environ, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(temporary)}
    command = unprivileged.python("-c", code, data)
    if foreign == "lock":
        # The files of somebody else who used this cache first.
        subprocess.run(command, env=variables, check=True, capture_output=True)
    closed = [cache] if foreign == "directory" else [path for path in cache.rglob("*") if path.suffix == ".lock"]
    assert closed
    for path in closed:
        path.chmod(0o555 if path.is_dir() else 0)
    try:
        result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    finally:
        cache.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['a', 'b', 'c']"
    assert f"the cache {cache} cannot be used (Permission denied" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_shard_is_read_from_any_row_on(is_tar: bool, tmp_path: Path) -> None:
    source = find_source(streaming(make_shards(tmp_path / "data", (5, 40), tar=is_tar, rows_in_group=37)))
    index = load_index(source)
    first = 0
    for file, group, size in zip(index.files.tolist(), index.groups.tolist(), index.sizes.tolist(), strict=True):
        numbers = range(first, first + size)
        for start in (0, 1, size - 1, size):
            rows = list(source.read(file, group, start))
            assert [row.label for row in rows] == [number % 3 for number in numbers[start:]]
            contents = [make_png(number % 3, number) for number in numbers[start:]]
            assert [from_cell(row.cell)[0] for row in rows] == contents
        first += size
    assert first == 45


def test_the_index_is_made_once_and_anew_when_a_file_changes(is_tar: bool, tmp_path: Path, own_cache: Path) -> None:
    data = make_shards(tmp_path / "data", COUNTS, tar=is_tar)
    first = load_index(find_source(streaming(data)))
    (kept,) = (own_cache / "lora_dist_shards").glob("*.json")
    written = kept.stat().st_mtime_ns
    assert load_index(find_source(streaming(data))).digest == first.digest
    assert kept.stat().st_mtime_ns == written
    write = write_tar if is_tar else write_parquet
    write(next(data.glob("train-00001*")), [(make_png(0, number), 0) for number in range(3)])
    changed = load_index(find_source(streaming(data)))
    assert changed.sizes.tolist() == [5, 3, 4]
    assert changed.digest != first.digest


def _index(settings: DataSettings) -> list[int]:
    return load_index(find_source(settings)).sizes.tolist()


def test_processes_that_need_the_index_at_the_same_time_get_the_same(tmp_path: Path) -> None:
    settings = streaming(make_shards(tmp_path / "data", COUNTS))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_index, [settings] * 4) == [[5, 2, 4]] * 4


def test_empty_row_groups_and_files_are_no_shards(tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", (2, 0, 3))
    assert load_index(find_source(streaming(data))).sizes.tolist() == [2, 3]
    assert load_index(find_source(streaming(data))).files.tolist() == [0, 2]


def test_shards_may_stand_in_a_folder_for_each_split(is_tar: bool, tmp_path: Path) -> None:
    made = make_shards(tmp_path / "made", COUNTS, tar=is_tar)
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for index, file in enumerate(sorted(made.glob(f"{split}-*"))):
            file.rename(tmp_path / "data" / split / f"{index:04d}{file.suffix}")
    assert load_index(find_source(streaming(tmp_path / "data"))).sizes.tolist() == [5, 2, 4]


def test_labels_may_be_names(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"picture": {"bytes": make_png(0, n), "path": f"{n}.png"}, "kind": "xyz"[n % 2]} for n in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "train-0.parquet")
    settings = streaming(tmp_path / "data", image_column_name="picture", label_column_name="kind")
    assert load_index(find_source(settings)).labels == ["x", "y"]


def _kind(number: int) -> str:
    return "xyz"[number % 3]


@pytest.mark.parametrize("streamed", [False, True], ids=["loaded", "streamed"])
@pytest.mark.parametrize(
    ("members", "flags", "labels"),
    [
        (lambda n: {"PNG": make_png(0, n), "CLS": str(n % 3).encode()}, {}, ["0", "1", "2"]),
        (
            lambda n: {"png": make_png(0, n), "json": json.dumps({"id": n, "kind": {"name": _kind(n)}}).encode()},
            {"label_column_name": "json.kind.name"},
            ["x", "y", "z"],
        ),
    ],
    ids=["upper case", "json"],
)
def test_labels_of_a_tar_file_may_be_in_upper_case_or_in_json(
    members: Any, flags: dict[str, str], labels: list[str], streamed: bool, tmp_path: Path
) -> None:
    for split, count in (("train", 9), ("validation", 6)):
        write_members(tmp_path / "data" / f"{split}-0.tar", [members(number) for number in range(count)])
    settings = streaming(tmp_path / "data", **flags).model_copy(update={"streaming": streamed})
    data = load_streamed(settings, 0, 1) if streamed else load_data(settings, 0)
    assert data.labels == labels
    found = data.train.reader().read(0, range(9))
    assert [found[number].label for number in range(9)] == [0, 1, 2] * 3
    assert load_rgb(found[8].source).size == (40, 32)


def test_members_that_cannot_be_read_are_answered_with_a_way_out(tmp_path: Path) -> None:
    def refusal(name: str, members: Callable[[int], dict[str, bytes]]) -> str:
        for split in ("train", "validation"):
            write_members(tmp_path / name / f"{split}-0.tar", [members(number) for number in range(6)])
        with pytest.raises(UserError) as caught:
            load_index(find_source(streaming(tmp_path / name)))
        return str(caught.value)

    png = make_png(0, 0)
    assert "in the same case: name all images .jpg" in refusal("1", lambda n: {("png", "PNG")[n % 2]: png, "cls": b"0"})
    assert "names of classes as .txt, and set --label_column_name txt" in refusal(
        "2", lambda _: {"png": png, "cls": b"cat"}
    )
    assert "--label_column_name: png, json." in refusal(
        "3", lambda n: {"png": png, "json": json.dumps({"kind": _kind(n), "at": n}).encode()}
    )
    with pytest.raises(
        UnreadableImageError, match=r"row 3: not an image: None; in a tar file, all images need the same extension"
    ):
        load_rgb(None, "row 3")  # type: ignore[arg-type]  # as in an empty cell of a table


@pytest.mark.parametrize("split", ["train", "validation"])
def test_parquet_files_without_rows_are_left_out(split: str, tmp_path: Path) -> None:
    """`datasets` reads a file in batches of the size of its first row group, and fails if that is 0."""
    data = make_shards(tmp_path / "data", (9,))
    write_parquet(data / f"{split}-00000-of-00000.parquet", [])
    settings = streaming(data).model_copy(update={"streaming": False})
    loaded = load_data(settings, 0)
    assert (len(loaded.train), len(loaded.validation)) == (9, 9)
    assert load_alone(streaming(data), split).num_rows == 9
    (data / f"{split}-00000-of-00000.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"00000-of-00000\.parquet: .*0 bytes.* Remove the file, or write it again"):
        load_data(settings, 0)


def test_only_the_validation_split_is_loaded(is_tar: bool, tmp_path: Path, own_cache: Path) -> None:
    data = make_shards(tmp_path / "data", (50, 50), validation=4, tar=is_tar)
    table = load_alone(streaming(data), "validation")
    assert table.num_rows == 4
    assert load_alone(streaming(data), "validation[:3]").num_rows == 3
    assert not {path.name for path in own_cache.rglob("*.arrow") if "train" in path.name}
    assert load_dataset(str(data), split="train").num_rows == 100, "the rest is there, had it been asked for"


def test_indexing_parquet_reads_no_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_parquet(tmp_path / "data" / "train-0.parquet", [(rng.bytes(10**6), 0) for _ in range(30)], rows_in_group=10)
    source = find_source(streaming(tmp_path / "data"))
    before = _bytes_read()
    assert load_index(source).sizes.tolist() == [10, 10, 10]
    assert _bytes_read() - before < 10**6


def test_a_row_group_is_read_a_page_at_a_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "data" / "train-0.parquet"
    write_parquet(path, [(rng.bytes(10**6), 0) for _ in range(150)])
    pq.write_table(pq.read_table(path), path, write_batch_size=4)
    source = find_source(streaming(tmp_path / "data"))
    assert load_index(source).sizes.tolist() == [150]
    before, most = pa.total_allocated_bytes(), 0
    for _ in source.read(0, 0, 0):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 60 * 10**6


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [_cut, lambda path: path.write_bytes(b"")], ids=["cut", "empty"])
def test_a_file_that_cannot_be_read_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", COUNTS)
    damage(data / "train-00001-of-00003.parquet")
    with pytest.raises(UserError, match=r"cannot read .*/train-00001-of-00003\.parquet"):
        load_index(find_source(streaming(data)))


def test_a_row_without_a_label_is_named(is_tar: bool, tmp_path: Path) -> None:
    data = make_shards(tmp_path / "data", COUNTS, tar=is_tar)
    write = write_tar if is_tar else write_parquet
    write(next(data.glob("train-00001*")), [(make_png(0, 0), 0), (make_png(0, 0), -1)])
    with pytest.raises(UserError, match=r"train-00001-of-00003\.\w+: 1 of 2 rows have no label .*row 1 \(-1\)"):
        load_index(find_source(streaming(data)))


@pytest.mark.parametrize("labels", [pa.array([0.5, float("nan"), None]), pa.array(["x", " ", None])])
def test_rows_with_blank_labels_are_found_before_training(labels: pa.Array, tmp_path: Path, own_cache: Path) -> None:
    """An index that an older release wrote with them is not used."""
    cells = pa.array([{"bytes": make_png(0, 0), "path": "x.png"}] * 3)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "data" / f"{split}.parquet")
    settings = streaming(tmp_path / "data", on_bad_image="skip")
    old = {"sizes": [[3]], "labels": [labels[0].as_py(), labels[1].as_py()], "digest": "x"}
    source = find_source(settings)
    file = own_cache / "lora_dist_shards" / f"{shards._identity(source)}.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"train\.parquet: 2 of 3 rows have no label .*row 1 \(.*row 2 \(None\)"):
        load_index(source)


def test_what_cannot_be_streamed_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of format imagefolder"):
        find_source(streaming(photos))
    data = make_shards(tmp_path / "data", (2,))
    with pytest.raises(UserError, match=r"no split 'test'; it has train, validation"):
        find_source(streaming(data, train_split="test"))
    with pytest.raises(UserError, match="--label_column_name nope: the data set has image, label"):
        find_source(streaming(data, label_column_name="nope"))
    with pytest.raises(UserError, match=r"cannot load split 'train' of data set '.*/nowhere'"):
        find_source(streaming(tmp_path / "nowhere"))
    file = next(data.rglob("*.parquet"))
    for read in (find_source, lambda _: load_data(DataSettings(dataset_name=str(file)), 0)):
        with pytest.raises(UserError, match="It is a file: name the directory that contains it"):
            read(streaming(file))


def test_the_number_of_threads_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_shards(tmp_path / "data", (1,) * 20)
    digests = set()
    for threads in (1, 7):
        monkeypatch.setattr(shards, "THREADS", threads)
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / f"cache{threads}")
        digests.add(load_index(find_source(streaming(data))).digest)
    assert len(digests) == 1
