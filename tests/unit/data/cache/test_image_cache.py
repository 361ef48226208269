"""The cache of training images: built once, found again, made anew where something has changed or is damaged."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.disks import small_disk
from lora_dist_testing.tiny import make_folder, make_image, make_shards
from PIL import Image
from transformers import ViTImageProcessor

from lora_dist.data.batch import Batch, TrainImages
from lora_dist.data.cache import image_cache
from lora_dist.data.cache.image_cache import CachedSplit, ImageCache, cached
from lora_dist.data.loader import batches, train_loader
from lora_dist.data.pixels.images import load_rgb
from lora_dist.data.pixels.transforms import ImageTransforms, interpolated
from lora_dist.data.sampling.order import BatchPlan, ShuffledOrder
from lora_dist.data.sources.load import load_data
from lora_dist.data.sources.split import Split
from lora_dist.errors import UserError
from lora_dist.settings.train import AugmentationSettings, DataSettings

SIZE = (16, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "MIN_IMAGES", 4)


def split_of(folder: Path) -> Split:
    train = load_data(DataSettings(train_dir=str(folder), validation_dir=str(folder)), seed=0).train
    assert isinstance(train, Split)
    return train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images, in three files of a cache."""
    return make_folder(tmp_path / "photos", per_class=(5, 3, 3), size=(60, 50))


def build(folder: Path, root: Path, size: tuple[int, int] = SIZE) -> CachedSplit:
    found = cached(split_of(folder), str(root), size, build=True)
    assert isinstance(found, CachedSplit)
    return found


def images_of(split: CachedSplit) -> list[Any]:
    return [np.array(one.source) for one in split.reader().read(0, range(len(split))).values()]


def written(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in root.rglob("part-*.pixels")}


def test_images_are_kept_a_little_larger_than_the_model_takes_them(folder: Path, tmp_path: Path) -> None:
    split = build(folder, tmp_path / "cache")
    assert len(written(tmp_path / "cache")) == 3
    found = images_of(split)
    assert len(found) == 11
    for row, image in enumerate(found):
        expected = interpolated(np.asarray(split.image(row)), (18, 22))[0].permute(1, 2, 0).numpy()
        assert np.array_equal(image, expected)


def test_small_images_are_kept_as_they_are(folder: Path, tmp_path: Path) -> None:
    split = build(folder, tmp_path / "cache", (44, 52))
    assert all(np.array_equal(one, split.image(row)) for row, one in enumerate(images_of(split)))


def test_the_largest_side_that_counts_decides(folder: Path, tmp_path: Path) -> None:
    cache = ImageCache(tmp_path, split_of(folder), (70, 140))
    assert [cache.kept(size) for size in ((1600, 100), (800, 160), (500, 500), (160, 80), (90, 2000))] == [
        (80, 1280),
        (80, 400),
        (160, 160),
        (80, 160),
        (2000, 90),
    ]


def test_a_cache_is_found_again_by_any_split_of_the_same_data(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "cache")
    before = written(tmp_path / "cache")
    some = split_of(folder).select(np.array([10, 2, 5]))
    found = cached(some, str(tmp_path / "cache"), SIZE, build=True)
    assert isinstance(found, CachedSplit)
    assert written(tmp_path / "cache") == before
    assert [one.label for one in found.reader().read(0, range(3)).values()] == some.labels.tolist()
    assert np.array_equal(images_of(found)[0], images_of(build(folder, tmp_path / "cache"))[10])
    assert (len(found), found.name(1), found.fingerprint()) == (3, some.name(1), some.fingerprint())
    assert found.describe() == some.describe()


def _touch(folder: Path) -> None:
    os.utime(folder / "b" / "001.png", (1, 1))


def _replace(folder: Path) -> None:
    make_image(2, 77, (60, 50)).save(folder / "b" / "001.png")


def _add(folder: Path) -> None:
    make_image(2, 78, (60, 50)).save(folder / "b" / "900.png")


@pytest.mark.parametrize("change", [_touch, _replace, _add, lambda folder: (folder / "b" / "001.png").unlink()])
def test_a_change_of_the_files_makes_another_cache(change: Callable[[Path], Any], folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "cache")
    before = written(tmp_path / "cache")
    change(folder)
    split = build(folder, tmp_path / "cache")
    after = written(tmp_path / "cache")
    assert len(after) == len(before) + 3
    assert before.items() < after.items()
    assert all(np.array_equal(one, split.cache.pixels(row)) for row, one in enumerate(images_of(split)))


def test_another_size_makes_another_cache(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "cache")
    other = build(folder, tmp_path / "cache", (24, 24))
    assert len({path.parent for path in written(tmp_path / "cache")}) == 2
    assert images_of(other)[0].shape == (27, 33, 3)


def test_data_sets_with_images_in_them_are_cached(tmp_path: Path) -> None:
    settings = DataSettings(dataset_name=str(make_shards(tmp_path / "data", (6, 5))), validation_split="validation")
    split = load_data(settings, seed=0).train
    assert isinstance(split, Split)
    found = cached(split, str(tmp_path / "cache"), (64, 64), build=True)
    assert isinstance(found, CachedSplit)
    assert all(np.array_equal(one, split.image(row)) for row, one in enumerate(images_of(found)))
    again = load_data(settings, seed=0).train
    assert isinstance(again, Split)
    before = written(tmp_path / "cache")
    cached(again, str(tmp_path / "cache"), (64, 64), build=True)
    assert written(tmp_path / "cache") == before
    part = load_data(settings.model_copy(update={"train_split": "train[:5]"}), seed=0).train
    assert isinstance(part, Split)
    cached(part, str(tmp_path / "cache"), (64, 64), build=True)
    assert len(written(tmp_path / "cache")) > len(before)


@pytest.mark.parametrize("damage", ["cut", "index", "gone"])
def test_a_file_that_is_not_whole_is_rebuilt(
    damage: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = images_of(build(folder, tmp_path / "cache"))
    before = written(tmp_path / "cache")
    part = max(before)
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-9])
    elif damage == "index":
        part.write_bytes(part.read_bytes()[:-30] + bytes(6) + part.read_bytes()[-24:])
    else:
        part.unlink()
    with caplog.at_level(logging.WARNING):
        split = build(folder, tmp_path / "cache")
    assert (f"rebuilding 1 damaged files of the image cache, the first is {part}" in caplog.text) == (damage != "gone")
    after = written(tmp_path / "cache")
    assert {path for path in before if after[path] == before[path]} >= before.keys() - {part}
    assert all(map(np.array_equal, images_of(split), expected))


def test_a_file_that_is_damaged_after_the_build_is_ignored_and_rebuilt(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split = build(folder, tmp_path / "cache")
    expected = images_of(split)
    part = split.cache.path(1)
    part.write_bytes(part.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert all(map(np.array_equal, images_of(split), expected))
    assert caplog.text.count("ignoring a damaged file of the image cache; the next run rebuilds it") == 1
    assert str(part) in caplog.text
    build(folder, tmp_path / "cache")
    caplog.clear()
    assert all(map(np.array_equal, images_of(split), expected))
    assert not caplog.text


def test_a_file_that_is_removed_during_a_run_changes_nothing(folder: Path, tmp_path: Path) -> None:
    split = build(folder, tmp_path / "cache")
    expected = images_of(split)
    split.cache.path(0).unlink()
    assert all(map(np.array_equal, images_of(split), expected))


BUILD = """
import sys, time
from test_image_cache import build, image_cache
from pathlib import Path
image_cache.MIN_IMAGES = 4
slow, original = float(sys.argv[3]), image_cache.ImageCache.pixels
def pixels(self, row):
    time.sleep(slow)
    return original(self, row)
image_cache.ImageCache.pixels = pixels
build(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def start_build(folder: Path, root: Path, seconds_an_image: float) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", BUILD, str(folder), str(root), str(seconds_an_image)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path}, start_new_session=True)


def test_a_build_that_was_killed_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos", per_class=12, size=(60, 50))
    process = start_build(folder, tmp_path / "cache", 0.2)
    deadline = time.monotonic() + 90
    while len(written(tmp_path / "cache")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = written(tmp_path / "cache")
    assert 2 <= len(before) < 9
    split = build(folder, tmp_path / "cache")
    after = written(tmp_path / "cache")
    assert len(after) == 9
    assert before.items() < after.items()
    assert not list((tmp_path / "cache").rglob(".writing*"))
    assert all(np.array_equal(one, split.cache.pixels(row)) for row, one in enumerate(images_of(split)))


def test_of_two_processes_one_builds_and_the_other_waits(folder: Path, tmp_path: Path) -> None:
    processes = [start_build(folder, tmp_path / "cache", 0.1) for _ in range(2)]
    seen: dict[Path, set[int]] = {}
    while any(process.poll() is None for process in processes):
        for path, number in written(tmp_path / "cache").items():
            seen.setdefault(path, set()).add(number)
        time.sleep(0.02)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(written(tmp_path / "cache")) == 3
    assert all(len(numbers) == 1 for numbers in seen.values()), "no file was built twice"


def training_batches(split: Any, workers: int = 0, skip: bool = False, **augmentation: Any) -> list[Batch]:
    settings = AugmentationSettings(**augmentation)
    transforms = ImageTransforms(ViTImageProcessor(size={"height": 16, "width": 16}), settings)
    images = TrainImages(split, transforms, settings, seed=3, skip_bad_images=skip)
    order = BatchPlan(ShuffledOrder(len(split), seed=3), 4, 1, 1, 0)
    data = DataSettings(dataloader_num_workers=workers)
    return list(batches(train_loader(images, order, 0, 2 * order.steps_per_epoch, data, CPU)))


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {"augmentation": "none"},
    "basic": {"random_erasing": 0.3, "mixup_alpha": 0.5},
    "policy": {"augmentation": "randaugment"},
    "device": {"augment_on_device": True, "cutmix_alpha": 0.5},
}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_a_run_from_the_cache_is_one_on_the_images_that_are_in_it(
    augmentation: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    split = build(folder, tmp_path / "cache")
    for row, image in enumerate(images_of(split)):
        Path(split.name(row)).unlink()
        (tmp_path / "small" / Path(split.name(row)).parent.name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "small" / Path(split.name(row)).relative_to(folder))
    expected = training_batches(split_of(tmp_path / "small"), **augmentation)
    for workers in (0, 2):
        found = training_batches(split, workers, **augmentation)
        assert len(found) == len(expected) == 6
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.indices, other.indices)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.pixel_values, other.pixel_values)


def test_on_the_device_views_are_those_of_a_worker_to_one_level(folder: Path, tmp_path: Path) -> None:
    split = build(folder, tmp_path / "cache")
    here, there = (training_batches(split, augment_on_device=device) for device in (False, True))
    for one, other in zip(here, there, strict=True):
        assert (one.pixel_values - other.pixel_values).abs().max() <= 1.5 * 2 / 255


def test_what_cannot_be_read_is_left_to_the_run(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = training_batches(build(folder, tmp_path / "before"), skip=True)
    bad = folder / "b" / "001.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        split = build(folder, tmp_path / "cache")
    assert "1 of them cannot be read; --on_bad_image decides" in caplog.text
    found = training_batches(split, skip=True)
    for one, other in zip(found, expected, strict=True):
        kept = one.indices != 6
        assert one.unreadable is not None
        assert torch.equal(one.unreadable, ~kept)
        assert torch.equal(one.pixel_values[kept], other.pixel_values[kept])
    assert sum(int((batch.indices == 6).sum()) for batch in found) == 2
    with pytest.raises(UserError, match=r"b/001\.png.*--on_bad_image skip"):
        training_batches(split)


def test_large_jpegs_are_cached_from_fewer_pixels(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(0, 0, (60, 40)).resize((600, 400), Image.Resampling.BICUBIC).save(folder / "1.jpg", exif=exif)
    (image,) = images_of(build(tmp_path / "photos", tmp_path / "cache"))
    assert image.shape == (27, 18, 3)
    whole = load_rgb(str(folder / "1.jpg")).resize((18, 27), Image.Resampling.BILINEAR)
    assert np.abs(image.astype(int) - np.asarray(whole)).mean() < 4


@pytest.mark.root
def test_a_dry_run_writes_nothing_and_says_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    split = split_of(folder)
    assert cached(split, str(tmp_path / "cache"), SIZE, build=False) is split
    assert not (tmp_path / "cache").exists()
    with small_disk(tmp_path / "small", "8k") as disk:
        for making in (False, True):
            with pytest.raises(UserError, match=r"--cache_dir .*small: .* free, and the images take 14 kB"):
                cached(split, str(disk), SIZE, build=making)
    build(folder, tmp_path / "cache")
    assert isinstance(cached(split, str(tmp_path / "cache"), SIZE, build=False), CachedSplit)


def test_a_directory_that_cannot_be_written_to_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"--cache_dir .*cache: cannot write there"):
        build(folder, tmp_path / "cache")


@pytest.mark.root
def test_a_disk_that_fills_up_on_the_way_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "free_bytes", lambda _: 10**9)
    with (
        small_disk(tmp_path / "small", "8k") as disk,
        pytest.raises(UserError, match=r"--cache_dir .*small: cannot write there .No space left"),
    ):
        build(folder, disk)


def test_a_finished_cache_can_be_read_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    split = build(folder, tmp_path / "cache")
    (split.cache.directory / "lock").unlink(missing_ok=True)
    (split.cache.directory / "lock").mkdir()
    assert len(images_of(build(folder, tmp_path / "cache"))) == 11
