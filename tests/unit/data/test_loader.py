"""Batches that are a function of seed, epoch and row, whatever the workers and the processes; bad images are named."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.tiny import make_folder, view_of
from PIL import Image
from torch import Tensor
from torch.distributed import TCPStore
from transformers import ViTImageProcessor

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.loader import batches, evaluation_loader, train_loader, workers_of
from lora_dist.data.pixels.transforms import ImageTransforms
from lora_dist.data.sampling.order import PADDING_INDEX, BatchPlan, ShuffledOrder
from lora_dist.data.sources.load import ImageData, load_data
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.settings.train import AugmentationSettings, DataSettings

CPU = torch.device("cpu")
PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def data(photos: Path) -> ImageData:
    return load_data(DataSettings(train_dir=str(photos / "train"), validation_dir=str(photos / "validation")), seed=1)


def workers(count: int | None) -> DataSettings:
    return DataSettings(dataloader_num_workers=count)


def training_batches(
    split: Split,
    batch: int = 4,
    accumulation: int = 1,
    world: int = 1,
    rank: int = 0,
    steps: tuple[int, int] = (0, 0),
    num_workers: int = 0,
    **augmentation: Any,
) -> list[Batch]:
    """The batches of one process, by default of two epochs."""
    settings = AugmentationSettings(**augmentation)
    images = TrainImages(split, ImageTransforms(PROCESSOR, settings), settings, seed=3)
    order = BatchPlan(ShuffledOrder(len(split), seed=3), batch, accumulation, world, rank)
    first, last = steps if steps[1] else (0, 2 * order.steps_per_epoch)
    return list(batches(train_loader(images, order, first, last, workers(num_workers), CPU)))


def evaluation_batches(
    split: Split, batch: int = 4, world: int = 1, rank: int = 0, num_workers: int = 0
) -> list[Batch]:
    transforms = ImageTransforms(PROCESSOR)
    return list(batches(evaluation_loader(split, transforms, batch, world, rank, workers(num_workers), CPU)))


def samples(split: Split, batch: int, accumulation: int = 1, world: int = 1, **more: Any) -> dict[Any, list[Tensor]]:
    """(epoch, row) to all that the batches of all processes say of that sample, over two epochs."""
    length = BatchPlan(ShuffledOrder(len(split), seed=3), batch, accumulation, world, 0).steps_per_epoch
    found: dict[Any, list[Tensor]] = {}
    for epoch in (0, 1):
        steps = (epoch * length, (epoch + 1) * length)
        for rank in range(world):
            for part in training_batches(split, batch, accumulation, world, rank, steps, **more):
                for index in torch.nonzero(part.weights).flatten().tolist():
                    key = (epoch, int(part.indices[index]))
                    assert key not in found
                    assert part.deferred is None
                    found[key] = [field[index] for field in part[:-1] if field is not None]
    assert len(found) == 2 * len(split)
    return found


def assert_equal(first: Batch, second: Batch) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


MIXES: dict[str, dict[str, Any]] = {
    "plain": {"augmentation": "randaugment", "random_erasing": 0.3},
    "mixed": {"mixup_alpha": 0.4, "cutmix_alpha": 0.8},
    "device": {"augment_on_device": True, "random_erasing": 0.3, "cutmix_alpha": 0.8},
}


@pytest.mark.parametrize("augmentation", MIXES.values(), ids=MIXES)
def test_workers_change_nothing(data: ImageData, augmentation: dict[str, Any]) -> None:
    alone = training_batches(data.train, num_workers=0, **augmentation)
    helped = training_batches(data.train, num_workers=2, **augmentation)
    assert len(alone) == len(helped) == 14
    for first, second in zip(alone, helped, strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("augmentation", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("batch", "accumulation", "world"), [(2, 2, 2), (1, 2, 4), (4, 2, 1), (27, 1, 1), (8, 1, 3)])
def test_processes_and_batches_change_nothing_in_a_sample(
    data: ImageData, augmentation: dict[str, Any], batch: int, accumulation: int, world: int
) -> None:
    expected = samples(data.train, 8, **augmentation)
    found = samples(data.train, batch, accumulation, world, **augmentation)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        # On the device, a batch is resized by products of matrices, which round as its size has it.
        exact = "augment_on_device" not in augmentation
        for one, other in zip(found[key], values, strict=True):
            assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-5), key


def test_a_view_is_that_of_seed_epoch_and_row(data: ImageData) -> None:
    settings = AugmentationSettings()
    transforms = ImageTransforms(PROCESSOR, settings)
    found = samples(data.train, 4)
    for (epoch, row), (pixels, label, *_) in found.items():
        assert torch.equal(pixels, view_of(transforms, data.train.image(row), (3, epoch, row)))
        assert label == data.train.labels[row]
    assert not torch.equal(found[0, 5][0], found[1, 5][0]), "the next epoch has another view"


def test_a_resumed_loader_goes_on_with_the_same_batches(data: ImageData) -> None:
    whole = training_batches(data.train, accumulation=2, steps=(0, 8), mixup_alpha=1.0)
    tail = training_batches(data.train, accumulation=2, steps=(3, 8), mixup_alpha=1.0)
    assert 0 < len(tail) < len(whole)
    for first, second in zip(whole[-len(tail) :], tail, strict=True):
        assert_equal(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_random_numbers_of_training_alone(data: ImageData, num_workers: int) -> None:
    """Dropout draws from them, and a resumed run loads less than one that was never stopped."""
    torch.manual_seed(8)
    before = torch.get_rng_state()
    training_batches(data.train, num_workers=num_workers, augmentation="trivialaugment", mixup_alpha=1.0)
    evaluation_batches(data.validation, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_process_with_nothing_to_do_gets_padding_of_weight_0(data: ImageData) -> None:
    three = data.train.select(np.array([0, 11, 26]))
    shares = [training_batches(three, batch=4, world=4, rank=rank, steps=(0, 1)) for rank in range(4)]
    assert [len(share) for share in shares] == [1] * 4
    assert [share[0].weights.tolist() for share in shares] == [[1], [1], [1], [0]]
    assert all(share[0].pixel_values.shape == (1, 3, 16, 16) for share in shares)


def test_types_and_shapes_are_as_described(data: ImageData) -> None:
    plain, mixed = (training_batches(data.train, steps=(0, 1), mixup_alpha=alpha)[0] for alpha in (0.0, 1.0))
    for batch in (plain, mixed):
        assert (batch.pixel_values.shape, batch.pixel_values.dtype) == ((4, 3, 16, 16), torch.float32)
        assert (batch.labels.dtype, batch.indices.dtype, batch.weights.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        assert torch.equal(batch.labels, torch.from_numpy(data.train.labels[batch.indices]))
    assert plain.partner_labels is None
    assert plain.shares is None
    assert mixed.partner_labels is not None
    assert mixed.shares is not None
    assert (mixed.partner_labels.dtype, mixed.shares.dtype) == (torch.int64, torch.float32)
    moved = mixed.to(torch.device("meta"))
    assert moved.unreadable is None
    assert moved.deferred is None
    assert all(field is not None and field.device.type == "meta" for field in moved[:-2])


def plain_folder(root: Path, colors: dict[str, int], per_class: int) -> Split:
    """Each class is of one grey, which tells what a mixed image is made of."""
    for name, grey in colors.items():
        (root / name).mkdir()
        for number in range(per_class):
            Image.new("RGB", (20, 20), (grey,) * 3).save(root / name / f"{number}.png")
    return load_data(DataSettings(train_dir=str(root), validation_dir=str(root)), seed=0).train


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_shares_and_partner_labels_say_what_is_in_the_pixels(mixup: float, cutmix: float, tmp_path: Path) -> None:
    """Black is normalised to -1 and white to 1, so the mean of an image tells its shares."""
    split = plain_folder(tmp_path, {"black": 0, "white": 255}, 6)
    values = torch.tensor([-1.0, 1.0])
    mixtures = 0
    for batch in training_batches(split, mixup_alpha=mixup, cutmix_alpha=cutmix):
        assert batch.shares is not None
        assert batch.partner_labels is not None
        expected = batch.shares * values[batch.labels] + (1 - batch.shares) * values[batch.partner_labels]
        assert torch.allclose(batch.pixel_values.mean(dim=(1, 2, 3)), expected, atol=1e-5)
        mixtures += int((batch.labels != batch.partner_labels).sum())
    assert mixtures, "some pairs are of two classes, so that the test shows something"


def test_a_single_sample_is_mixed_with_itself(data: ImageData) -> None:
    one = data.train.select(np.array([4]))
    batch = training_batches(one, steps=(0, 1), mixup_alpha=1.0)[0]
    plain = training_batches(one, steps=(0, 1))[0]
    assert torch.allclose(batch.pixel_values, plain.pixel_values, atol=1e-6)
    assert batch.partner_labels is not None
    assert torch.equal(batch.partner_labels, batch.labels)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (2, 2), (3, 4), (100, 1)])
def test_an_evaluation_sees_every_row_once_as_the_processor_makes_it(
    data: ImageData, batch: int, world: int, num_workers: int
) -> None:
    shares = [evaluation_batches(data.validation, batch, world, rank, num_workers) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    seen: list[int] = []
    for part in (part for share in shares for part in share):
        assert (part.partner_labels, part.shares) == (None, None)
        for index, row in enumerate(part.indices.tolist()):
            assert part.weights[index] == float(row != PADDING_INDEX)
            if row != PADDING_INDEX:
                seen.append(row)
                image = data.validation.image(row)
                assert torch.equal(part.pixel_values[index], PROCESSOR(image, return_tensors="pt")["pixel_values"][0])
                assert part.labels[index] == data.validation.labels[row]
    assert sorted(seen) == list(range(9))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("damage", [_empty, _truncate, Path.unlink])
@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_an_image_that_cannot_be_read_is_named(
    part: str, damage: Callable[[Path], None], num_workers: int, tmp_path: Path
) -> None:
    make_folder(tmp_path, classes=("a", "b"), per_class=3)
    split = load_data(DataSettings(train_dir=str(tmp_path), validation_dir=str(tmp_path)), seed=0).train
    damage(tmp_path / "b" / "001.png")
    load = training_batches if part == "train" else evaluation_batches
    with pytest.raises(UserError, match=r"cannot read an image of the data set: .*b/001\.png.*Repair the file"):
        load(split, num_workers=num_workers)


def test_a_partner_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """On two processes of one sample each, the neighbour of a sample is in no batch of its process."""
    make_folder(tmp_path, classes=("a", "b"), per_class=1)
    split = load_data(DataSettings(train_dir=str(tmp_path), validation_dir=str(tmp_path)), seed=0).train
    (tmp_path / "b" / "000.png").unlink()
    for rank in (0, 1):
        with pytest.raises(UserError, match=r"b/000\.png"):
            training_batches(split, batch=1, world=2, rank=rank, steps=(0, 1), mixup_alpha=1.0)


def test_images_before_a_bad_one_are_given_out(tmp_path: Path) -> None:
    make_folder(tmp_path, classes=("a", "b"), per_class=3)
    split = load_data(DataSettings(train_dir=str(tmp_path), validation_dir=str(tmp_path)), seed=0).train
    (tmp_path / "b" / "002.png").write_bytes(b"")
    loader = batches(evaluation_loader(split, ImageTransforms(PROCESSOR), 2, 1, 0, workers(2), CPU))
    assert [next(loader).indices.tolist(), next(loader).indices.tolist()] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match=r"b/002\.png"):
        next(loader)


class Collecting(TrainImages):
    """Its workers collect garbage after their own threads have started, on the stacks of threads that are gone."""

    def __getitems__(self, part: Any) -> Any:
        for _ in range(20):
            threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        gc.collect()
        return super().__getitems__(part)


def test_a_worker_does_not_end_what_was_garbage_at_its_fork(data: ImageData) -> None:
    """Ending a store there ended the worker: `std::system_error`, for the store's thread cannot be joined."""
    settings = AugmentationSettings()
    images = Collecting(data.train, ImageTransforms(PROCESSOR, settings), settings, seed=3)
    order = BatchPlan(ShuffledOrder(len(data.train), seed=3), 4, 1, 1, 0)
    loader = train_loader(images, order, 0, order.steps_per_epoch, workers(2), CPU)
    gc.disable()
    try:
        for _ in range(4):
            cycle: list[Any] = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
            cycle.append(cycle)
        del cycle
        assert len(list(batches(loader))) == order.steps_per_epoch
    finally:
        gc.enable()


def test_workers_by_default_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for cores, processes, expected in ((8, 1, 7), (8, 4, 1), (2, 1, 1), (1, 1, 1), (2, 8, 1), (64, 1, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert workers_of(workers(None), cuda) == expected
    assert workers_of(workers(None), CPU) == 0
    assert workers_of(workers(3), CPU) == 3


def test_the_wait_for_data_is_that_for_the_workers_alone(data: ImageData) -> None:
    """On a GPU, the copy and the deferred operations wait for the work that is queued there."""
    settings = AugmentationSettings()
    images = TrainImages(data.train, ImageTransforms(PROCESSOR, settings), settings, seed=3)
    order = BatchPlan(ShuffledOrder(len(data.train), seed=3), 4, 1, 1, 0)
    timed: list[Any] = []

    def spied(loaded: Iterator[Any]) -> Iterator[Any]:
        for found in loaded:
            timed.append(found)
            yield found

    finished = list(batches(train_loader(images, order, 0, 2, workers(0), CPU), CPU, spied))
    assert len(timed) == len(finished) == 2
    assert all(shard.content.deferred is not None for shard in timed)
    assert all(batch.deferred is None for batch in finished)
