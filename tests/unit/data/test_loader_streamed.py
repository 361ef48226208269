"""Batches of streamed data: the same to the bit for any number of workers, each of which reads its own lanes."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import config
from lora_dist_testing.tiny import make_png, make_shards, view_of, write_parquet
from torch.utils.data import DataLoader, Dataset
from transformers import ViTImageProcessor

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import PADDING_INDEX, BatchPlan
from lora_dist.data.sampling.training_split import TrainingSplit
from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.streaming import load_streamed
from lora_dist.errors import UserError
from lora_dist.settings.train import AugmentationSettings, DataSettings

CPU = torch.device("cpu")
PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})
UNEVEN = (13, 2, 9, 1, 7)
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "plain": {"augmentation": "randaugment"},
    "mixed": {"mixup_alpha": 0.4, "cutmix_alpha": 0.8},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=[False, True], ids=["parquet", "tar"])
def uneven(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_shards(tmp_path / "data", UNEVEN, tar=request.param, rows_in_group=5)


def streamed(directory: Path) -> TrainingSplit:
    settings = DataSettings(
        dataset_name=str(directory), streaming=True, validation_split="validation", shuffle_buffer_size=16
    )
    return load_streamed(settings, 3, 1).train


def images_of(split: TrainingSplit, **augmentation: Any) -> TrainImages:
    settings = AugmentationSettings(**augmentation)
    return TrainImages(split, ImageTransforms(PROCESSOR, settings), settings, seed=3)


def training_batches(
    split: TrainingSplit,
    workers: int,
    split_as: tuple[int, int, int, int] = (4, 2, 1, 0),
    first: int = 0,
    epochs: tuple[int, int] = (0, 2),
    **augmentation: Any,
) -> list[Batch]:
    """The batches of one process, by default over two epochs."""
    order = BatchPlan(split.sample_order(3), *split_as)
    begin, end = (epoch * order.steps_per_epoch for epoch in epochs)
    settings = DataSettings(dataloader_num_workers=workers)
    loader = train_loader(images_of(split, **augmentation), order, max(begin, first), end, settings, CPU)
    return list(batches(loader))


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for first, second in zip(found, expected, strict=True):
        for one, other in zip(first, second, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_workers_change_nothing(uneven: Path, augmentation: dict[str, Any]) -> None:
    split = streamed(uneven)
    alone = training_batches(split, 0, **augmentation)
    assert sorted(row for batch in alone for row in batch.indices.tolist()) == sorted([*range(32)] * 2)
    for workers in (1, 2, 3):
        assert_equal(training_batches(split, workers, **augmentation), alone)


def test_a_resumed_loader_goes_on_with_the_same_batches(uneven: Path) -> None:
    split = streamed(uneven)
    whole = training_batches(split, 0, mixup_alpha=1.0)
    tail = training_batches(split, 2, first=3, mixup_alpha=1.0)
    assert 0 < len(tail) < len(whole)
    assert_equal(tail, whole[-len(tail) :])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_processes_change_nothing_in_a_sample(uneven: Path, augmentation: dict[str, Any]) -> None:
    split = streamed(uneven)

    def samples(batch: int, accumulation: int, world: int) -> dict[tuple[int, int], list[torch.Tensor]]:
        found: dict[tuple[int, int], list[torch.Tensor]] = {}
        for epoch, rank in product((0, 1), range(world)):
            split_as, epochs = (batch, accumulation, world, rank), (epoch, epoch + 1)
            for part in training_batches(split, 0, split_as, epochs=epochs, **augmentation):
                for index in torch.nonzero(part.weights).flatten().tolist():
                    key = (epoch, int(part.indices[index]))
                    assert key not in found
                    found[key] = [field[index] for field in part if field is not None]
        assert len(found) == 64
        return found

    expected = samples(8, 1, 1)
    for split_as in ((2, 2, 2), (1, 4, 2), (3, 1, 3)):
        for key, values in samples(*split_as).items():
            assert all(torch.equal(one, other) for one, other in zip(values, expected[key], strict=True))


def test_a_view_is_that_of_the_same_row_without_streaming(tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "data", UNEVEN, rows_in_group=5)
    plain = load_data(DataSettings(dataset_name=str(directory), validation_split="validation"), 3).train
    transforms = ImageTransforms(PROCESSOR, AugmentationSettings())
    for batch in training_batches(streamed(directory), 2)[:4]:
        for pixels, label, row in zip(batch.pixel_values, batch.labels, batch.indices.tolist(), strict=True):
            assert torch.equal(pixels, view_of(transforms, plain.image(row), (3, 0, row)))
            assert label == plain.labels[row]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_a_process_whose_lanes_have_run_out_keeps_step_with_padding(mixup: float, workers: int, tmp_path: Path) -> None:
    split = streamed(make_shards(tmp_path / "data", (30, 3)))
    shares = [training_batches(split, workers, (4, 1, 2, rank), mixup_alpha=mixup) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    padding_batches = [batch for batch in shares[1] if batch.indices.tolist() == [PADDING_INDEX]]
    assert padding_batches
    for batch in padding_batches:
        assert batch.weights.tolist() == [0.0]
        assert [None if field is None else field.dtype for field in batch] == [
            None if field is None else field.dtype for field in shares[0][0]
        ]
    assert sum(float(batch.weights.sum()) for share in shares for batch in share) == 2 * 33


class Workers(Dataset):
    """Gives the number of the worker process that fetches a batch."""

    def __getitems__(self, batch: int) -> tuple[int, int]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None
        return batch, worker.id


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_loader_gives_batches_to_its_workers_in_turn(workers: int) -> None:
    """What the parts of a micro-batch rest on."""
    loader = DataLoader(
        Workers(), batch_sampler=range(20), num_workers=workers, prefetch_factor=2, collate_fn=lambda batch: batch
    )
    assert list(loader) == [(batch, batch % workers) for batch in range(20)]


class Recording(TrainImages):
    """Notes which process fetches which rows."""

    log: Path

    def prepared(self, samples: list[Any]) -> Batch:
        with (self.log / str(os.getpid())).open("a") as file:
            file.writelines(f"{sample.index}\n" for sample in samples)
        return super().prepared(samples)


def test_each_shard_is_read_by_one_worker(tmp_path: Path) -> None:
    split = streamed(make_shards(tmp_path / "data", (6, 5, 7, 3, 4, 8)))
    settings = AugmentationSettings()
    images = Recording(split, ImageTransforms(PROCESSOR, settings), settings, seed=3)
    images.log = tmp_path / "log"
    images.log.mkdir()
    order = BatchPlan(split.sample_order(3), 4, 1, 1, 0)
    list(batches(train_loader(images, order, 0, order.steps_per_epoch, DataSettings(dataloader_num_workers=3), CPU)))
    shard_of = np.repeat(np.arange(6), (6, 5, 7, 3, 4, 8))
    read = [{int(shard_of[int(row)]) for row in file.read_text().split()} for file in images.log.iterdir()]
    assert len(read) == 3
    assert sum(len(shards) for shards in read) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_by_shard_and_row(workers: int, tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "data", (4, 6))
    samples = [(b"no image" if number == 5 else make_png(number % 3, number), number % 3) for number in range(6)]
    write_parquet(directory / "train-00001-of-00002.parquet", samples, rows_in_group=4)
    with pytest.raises(
        UserError, match=r"cannot read an image .*: train-00001-of-00002\.parquet row 5: the content is text"
    ):
        training_batches(streamed(directory), workers)


def test_nothing_read_ahead_is_left_to_worker_processes(tmp_path: Path) -> None:
    """Two processes that go on with one open file disturb each other."""
    split = streamed(make_shards(tmp_path / "data", (40,) * 4))
    images = images_of(split)
    order = BatchPlan(split.sample_order(3), 4, 1, 1, 0)
    expected = training_batches(split, 0)
    images.batch(next(order.micro_batches(0)))
    images.close()
    order = BatchPlan(split.sample_order(3), 4, 2, 1, 0)
    loader = train_loader(images, order, 0, 2 * order.steps_per_epoch, DataSettings(dataloader_num_workers=2), CPU)
    assert_equal(list(batches(loader)), expected)
