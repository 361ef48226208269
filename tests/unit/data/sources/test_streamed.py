"""Streamed training data: what is read, how much of it is held, and what a bad image or too few shards are told."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import config
from lora_dist_testing.tiny import make_image, make_shards, write_parquet

from lora_dist import waiting
from lora_dist.data.pixels.images import UnreadableImageError, load_rgb
from lora_dist.data.sampling.order import BatchPlan
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.data.sources.shards import ShardSource
from lora_dist.data.sources.streaming import LaneReader, StreamedSplit, load_streamed
from lora_dist.errors import UserError
from lora_dist.settings.train import DataSettings

UNEVEN = (13, 2, 9, 1, 7)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=[False, True], ids=["parquet", "tar"])
def uneven(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_shards(tmp_path / "data", UNEVEN, tar=request.param)


def load(directory: Path, processes: int = 1, **more: Any) -> ImageData:
    settings = {"streaming": True, "validation_split": "validation", "shuffle_buffer_size": 16} | more
    return load_streamed(DataSettings(dataset_name=str(directory), **settings), 3, processes)


def streamed(directory: Path, **more: Any) -> StreamedSplit:
    train = load(directory, **more).train
    assert isinstance(train, StreamedSplit)
    return train


def test_both_splits_have_the_same_label_map(uneven: Path) -> None:
    data = load(uneven)
    tar = next(uneven.iterdir()).suffix == ".tar"
    assert data.labels == (["0", "1", "2"] if tar else ["a", "b", "c"])
    assert len(data.train) == 32
    assert data.validation.labels.tolist() == [number % 3 for number in range(1000, 1009)]


def test_a_shard_that_is_slow_to_come_is_named(
    uneven: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From a Hub that has fallen silent it is tried for half an hour."""
    reader = streamed(uneven).reader()
    monkeypatch.setattr(waiting, "AFTER_SECONDS", 0.1)
    read = ShardSource.read
    monkeypatch.setattr(ShardSource, "read", lambda *arguments: time.sleep(0.3) or read(*arguments))
    assert reader.read(0, [0])
    said = caplog.messages[0]
    assert re.fullmatch(r"waiting for train-0000\d-of-00005\.(parquet|tar) row 0 \(\d s so far\)", said)


def test_an_epoch_reads_every_image_once(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = streamed(uneven)
    opened: list[tuple[int, int, int]] = []
    read = ShardSource.read
    monkeypatch.setattr(ShardSource, "read", lambda *arguments: opened.append(arguments[1:]) or read(*arguments))
    reader = split.reader()
    order = BatchPlan(split.sample_order(3), 4, 1, 1, 0)
    for epoch in range(2):
        seen = []
        for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
            for micro in order.micro_batches(step):
                found = reader.read(epoch, [row for sample in micro for row in (sample.index, sample.partner)])
                for sample in micro:
                    one = found[sample.index]
                    image = load_rgb(one.source, one.name)
                    np.testing.assert_array_equal(image, make_image(sample.index % 3, sample.index))
                    assert one.label == sample.index % 3
                    seen.append(sample.index)
        assert sorted(seen) == list(range(32))
        assert sorted(opened) == [(file, 0, 0) for file in range(5)], "each shard is opened once, at its beginning"
        opened.clear()


@pytest.mark.parametrize("first", range(1, 8))
def test_a_resumed_run_reads_on_from_the_block_of_its_next_samples(uneven: Path, first: int) -> None:
    split = streamed(uneven)
    order = BatchPlan(split.sample_order(3), 4, 1, 1, 0)
    reader = split.reader()
    for step in range(first, order.steps_per_epoch):
        for micro in order.micro_batches(step):
            found = reader.read(0, [sample.index for sample in micro])
            assert [found[sample.index].label for sample in micro] == [sample.index % 3 for sample in micro]


def test_no_more_than_the_buffer_is_held(tmp_path: Path) -> None:
    split = streamed(
        make_shards(tmp_path / "data", (40,) * 8, rows_in_group=10), shuffle_buffer_size=32, streaming_lanes=8
    )
    reader = split.reader()
    assert isinstance(reader, LaneReader)
    order = BatchPlan(split.sample_order(3), 8, 1, 1, 0)
    for step in range(order.steps_per_epoch):
        for micro in order.micro_batches(step):
            reader.read(0, [sample.index for sample in micro])
            assert reader.held <= 32


def test_names_are_of_file_and_row(tmp_path: Path) -> None:
    split = streamed(make_shards(tmp_path / "data", UNEVEN, rows_in_group=4))
    assert split.name(0) == "train-00000-of-00005.parquet row 0"
    assert split.name(12) == "train-00000-of-00005.parquet row 12"
    assert split.name(13) == "train-00001-of-00005.parquet row 0"
    assert split.name(20) == "train-00002-of-00005.parquet row 5"
    assert split.reader().read(0, [20])[20].name == split.name(20)


def test_an_image_in_a_tar_is_named_by_its_member_too(tmp_path: Path) -> None:
    split = streamed(make_shards(tmp_path / "data", (3, 4), tar=True))
    name = "train-00001-of-00002.tar row 2 (train-00001-of-00002-00002.png)"
    assert split.reader().read(0, [5])[5].name == name


def test_a_shard_that_goes_while_it_is_read_is_named(uneven: Path) -> None:
    split = streamed(uneven)
    gone = next(uneven.glob("train-00002*"))
    gone.unlink()
    with pytest.raises(UnreadableImageError, match=rf"{gone.name} row 0: FileNotFoundError"):
        split.reader().read(0, [15])


def test_a_shard_that_shrinks_after_it_was_indexed_is_named(tmp_path: Path) -> None:
    split = streamed(make_shards(tmp_path / "data", (6, 6)), shuffle_buffer_size=100)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [(b"x", 0), (b"x", 0)])
    with pytest.raises(UnreadableImageError, match=r"train-00001-of-00002.parquet row 2: .* changed since"):
        split.reader().read(0, [7])


def test_the_fingerprint_is_of_files_sizes_and_labels(tmp_path: Path) -> None:
    one = streamed(make_shards(tmp_path / "one", UNEVEN))
    assert streamed(make_shards(tmp_path / "two", UNEVEN)).fingerprint() == one.fingerprint()
    assert streamed(make_shards(tmp_path / "three", (12, 3, 9, 1, 7))).fingerprint() != one.fingerprint()
    samples = [(b"x", 2 - number % 3) for number in range(13)]
    write_parquet(tmp_path / "two" / "train-00000-of-00005.parquet", samples)
    assert streamed(tmp_path / "two").fingerprint() != one.fingerprint()


def test_the_split_is_written_down_by_file_and_not_by_row(tmp_path: Path) -> None:
    data = load(make_shards(tmp_path / "data", UNEVEN, rows_in_group=4))
    described = data.describe_splits()["train"]
    assert list(described["files"].values()) == list(UNEVEN)
    assert described["num_samples"] == 32
    assert described["fingerprint"] == data.train.fingerprint()


def test_a_row_is_the_same_as_without_streaming(tmp_path: Path) -> None:
    """So its random view in each epoch is the same as well."""
    directory = make_shards(tmp_path / "data", UNEVEN, rows_in_group=4)
    plain = load_data(DataSettings(dataset_name=str(directory), validation_split="validation"), 3)
    one, other = plain.train.reader(), load(directory).train.reader()
    for row in range(32):
        assert one.read(0, [row])[row].source == other.read(0, [row])[row].source
        assert one.read(0, [row])[row].label == other.read(0, [row])[row].label


@pytest.mark.parametrize(("shards", "lanes"), [(1, 1), (3, 2), (5, 4), (64, 64), (70, 64)])
def test_lanes_are_a_power_of_two_by_default(shards: int, lanes: int, tmp_path: Path) -> None:
    split = streamed(make_shards(tmp_path / "data", (shards,), rows_in_group=1), allow_missing_classes=True)
    assert split.lanes.count == lanes
    assert split.lanes.block == max(2, 16 // lanes // 2 * 2)


def test_too_few_lanes_are_refused_with_the_way_out(uneven: Path) -> None:
    with pytest.raises(
        UserError, match=r"5 shards .* in 4 lanes .* 5 processes: set --streaming_lanes to between 5 and"
    ):
        load(uneven, processes=5)
    assert load(uneven, processes=5, streaming_lanes=5)
    with pytest.raises(UserError, match=r"in 4 lanes .* 6 processes: start fewer processes, or write .* more shards"):
        load(uneven, processes=6)
    with pytest.raises(UserError, match="--streaming_lanes 6: the data set has 5 shards"):
        load(uneven, streaming_lanes=6)


def test_classes_of_one_split_only_are_refused(tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "data", (4, 4), validation=2)
    with pytest.raises(UserError, match="classes without a single validation image: a"):
        load(directory)
    assert load(directory, allow_missing_classes=True).labels == ["a", "b", "c"]
    with pytest.raises(UserError, match="0 training images"):
        load(make_shards(tmp_path / "empty", (0,)), allow_missing_classes=True)
