"""Any image to upright RGB, as transformers loads it; what cannot be read is named."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from lora_dist.images import UnreadableImageError, load_rgb


def sample(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
    image = Image.fromarray(pixels[..., :3])
    if mode == "RGBA":
        return Image.fromarray(pixels)
    if mode == "LA":
        return Image.fromarray(pixels).convert("LA")
    if mode == "P":
        return image.quantize(16)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "jpg"), ("LA", "png"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"), ("RGB", "webp"),
     ("L", "tiff"), ("RGB", "bmp")],
)  # fmt: skip
def test_modes_agree_with_transformers(mode: str, suffix: str, tmp_path: Path) -> None:
    file = str(tmp_path / f"image.{suffix}")
    sample(mode).save(file)
    image = load_rgb(file)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(load_image(file)))
    assert np.array_equal(np.asarray(load_rgb(Path(file).read_bytes(), "bytes")), np.asarray(image))


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    pixels = np.asarray(load_rgb(str(tmp_path / "deep.png")))
    assert pixels.min() == 0
    assert pixels.max() == 255
    assert np.array_equal(pixels[..., 0], ramp >> 8)


def test_floating_point_pixels_are_readable(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 300.0, np.nan, -5.0]], dtype=np.float32)).save(tmp_path / "f.tiff")
    assert np.asarray(load_rgb(str(tmp_path / "f.tiff")))[0, :, 0].tolist() == [0, 255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, tmp_path: Path) -> None:
    image = sample("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = str(tmp_path / "turned.png")
    image.save(file, exif=exif)
    assert np.array_equal(np.asarray(load_rgb(file)), np.asarray(load_image(file)))
    assert load_rgb(file).size == ((20, 30) if orientation >= 5 else (30, 20))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", "truncated", None])
def test_what_cannot_be_read_is_named(content: bytes | str | None, tmp_path: Path) -> None:
    file = tmp_path / "odd.png"
    if content == "truncated":
        sample("RGB").save(file)
        file.write_bytes(file.read_bytes()[:-300])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"odd\.png"):
        load_rgb(str(file))


def test_a_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match=r"bomb\.png"):
        load_rgb(str(tmp_path / "bomb.png"))
