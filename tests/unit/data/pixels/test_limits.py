"""Images of an unusual shape: long and thin ones, and ones of more pixels than Pillow allows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_dist_testing.processors import PROCESSORS
from PIL import Image
from transformers import BitImageProcessor, Owlv2ImageProcessor, SamImageProcessor

from lora_dist.data.pixels.images import UnreadableImageError, load_rgb
from lora_dist.data.pixels.limits import CentreCrop, TooLongError, allow_pixels, is_too_thin
from lora_dist.data.pixels.transforms import ImageTransforms

SHAPES = [(1, 400), (2, 333), (3, 512), (5, 400), (7, 448), (20, 1000), (400, 1), (333, 2), (448, 7), (1000, 20)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_crop_of_a_long_image_gives_the_same_pixels(processor: str) -> None:
    made = PROCESSORS[processor]()
    crop = CentreCrop(made)
    sizes = []
    for shape in SHAPES:
        image = noise(*shape)
        whole, cut = (made(one, return_tensors="pt")["pixel_values"] for one in (image, crop(image)))
        assert torch.equal(whole, cut), shape
        sizes.append(crop(image).size)
    assert crop.edge == {"convnext": 36, "mobilevit": 40, "resize and crop": 40}.get(processor)
    # 3 x 512 gives no whole number of pixels with a shorter side of 40.
    cropped = sum(size != shape for size, shape in zip(sizes, SHAPES, strict=True))
    assert cropped == {None: 0, 36: 10, 40: 9}[crop.edge]


def test_a_processor_that_crops_without_a_resize_gives_the_same_pixels() -> None:
    made = BitImageProcessor(do_resize=False, crop_size={"height": 224, "width": 224})
    crop = CentreCrop(made)
    for shape in ((1000, 10), (10, 1000), (3000, 20)):
        image = noise(*shape)
        whole, cut = (made(one, return_tensors="pt")["pixel_values"] for one in (image, crop(image)))
        assert torch.equal(whole, cut), shape


def test_what_cannot_be_cropped_is_bounded() -> None:
    crop = CentreCrop(PROCESSORS["resize and crop"]())
    assert max(crop(noise(60_000, 1)).size) < 100
    with pytest.raises(TooLongError, match="7 x 300001 pixels are too long and thin"):
        crop(Image.new("RGB", (7, 300_001)))
    assert is_too_thin((3, 60_001))
    assert not is_too_thin((1, 60_000))
    assert not is_too_thin((300, 6_000))


def test_an_image_that_is_too_long_is_unreadable_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (7, 300_001)).save(tmp_path / "strip.png")
    transforms = ImageTransforms(PROCESSORS["resize and crop"]())
    with pytest.raises(UnreadableImageError, match=r"strip\.png: 7 x 300001"):
        transforms.load(str(tmp_path / "strip.png"))
    assert ImageTransforms(PROCESSORS["vit"]()).load(str(tmp_path / "strip.png")).size == (7, 300_001)


def test_an_image_whose_shorter_side_would_vanish_is_unreadable_by_name(tmp_path: Path) -> None:
    """The processor raises an error of its own, which would end a prediction of many images."""
    Image.new("RGB", (3000, 20)).save(tmp_path / "strip.png")
    Image.new("RGB", (20, 3)).save(tmp_path / "short.png")
    sides = {"height": 32, "width": 32}
    transforms = ImageTransforms(SamImageProcessor(size={"longest_edge": 32}, pad_size=sides, do_pad=True))
    with pytest.raises(UnreadableImageError, match=r"strip\.png: 3000 x 20 pixels are too long and thin for SamImage"):
        transforms.load(str(tmp_path / "strip.png"))
    assert transforms.resized([transforms.load(str(tmp_path / "short.png"))]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "processor",
    [
        Owlv2ImageProcessor(size={"height": 32, "width": 32}),
        BitImageProcessor(size={"max_height": 32, "max_width": 32}, crop_size=32),
    ],
    ids=["Owlv2", "longer side"],
)
def test_a_processor_with_errors_of_its_own_prepares_images(processor: Any) -> None:
    transforms = ImageTransforms(processor)
    images = [noise(64, 48), noise(40, 60)]
    torch.testing.assert_close(transforms.finished(transforms.resized(images)), transforms.batch(images))


def test_a_long_image_takes_little_memory(tmp_path: Path) -> None:
    """1 x 60000 pixels took 11.8 GB with a shorter side of 256."""
    Image.new("RGB", (1, 60_000), "red").save(tmp_path / "strip.png")
    code = (
        "import resource, sys\n"
        "from transformers import BitImageProcessor\n"
        "from lora_dist.data.pixels.transforms import ImageTransforms\n"
        "transforms = ImageTransforms(BitImageProcessor(size={'shortest_edge': 256}))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert transforms.resized([transforms.load(sys.argv[1])]).shape == (1, 3, 224, 224)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "strip.png")]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 100_000


def test_the_most_pixels_hold_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    allow_pixels(None)
    assert "LORA_DIST_MAX_IMAGE_PIXELS" not in os.environ
    allow_pixels(1_000_000_000)
    code = "import lora_dist.data.pixels.images; from PIL import Image; print(Image.MAX_IMAGE_PIXELS)"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ, check=True, capture_output=True, text=True)
    assert int(found.stdout) == Image.MAX_IMAGE_PIXELS == 500_000_000


def test_an_image_of_too_many_pixels_is_named_with_the_setting(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "huge.png")
    allow_pixels(1000)
    try:
        with pytest.raises(UnreadableImageError, match=r"huge\.png: .* limit of 1000 pixels; --max_image_pixels sets"):
            load_rgb(str(tmp_path / "huge.png"))
    finally:
        allow_pixels(None)


@pytest.mark.parametrize("process", ["logs.set_up_logs(is_main=True)", "workers.set_up_worker(0)"])
def test_no_process_prints_a_warning_of_pillow_for_an_image_within_the_limit(process: str, tmp_path: Path) -> None:
    """Neither a command nor a worker process of a loader that is not forked."""
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    code = (
        "import sys; from lora_dist import logs; from lora_dist.processes import workers\n"
        "from lora_dist.data.pixels import images\n"
        f"{process}; images.limits.allow_pixels(2000); images.load_rgb(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "large.png")]
    assert "Bomb" not in subprocess.run(command, check=True, capture_output=True, text=True).stderr


def test_a_later_run_of_one_process_has_the_usual_limit_again() -> None:
    usual = Image.MAX_IMAGE_PIXELS
    allow_pixels(1000)
    assert Image.MAX_IMAGE_PIXELS == 500
    allow_pixels(None)
    assert usual == Image.MAX_IMAGE_PIXELS
    assert "LORA_DIST_MAX_IMAGE_PIXELS" not in os.environ
