"""Any image to upright RGB, as transformers loads it; what cannot be read is named."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from lora_dist.data.pixels.images import UnreadableImageError, from_cell, load_rgb, opened


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
    [
        ("1", "png"),
        ("L", "jpg"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("RGB", "webp"),
        ("L", "tiff"),
        ("RGB", "bmp"),
    ],
)
def test_modes_agree_with_transformers(mode: str, suffix: str, tmp_path: Path) -> None:
    file = str(tmp_path / f"image.{suffix}")
    sample(mode).save(file)
    image = load_rgb(file)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(load_image(file)))
    assert np.array_equal(np.asarray(load_rgb(Path(file).read_bytes(), "bytes")), np.asarray(image))


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 320, dtype=np.uint16).reshape(16, 20)
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


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_tiff_is_the_same_from_a_file_and_from_its_bytes(mode: str, orientation: int, tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    image = image if mode == "I;16" else sample("RGB").convert(mode)
    file = tmp_path / "turned.tif"
    image.save(file, tiffinfo={0x0112: orientation})
    turned = image.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_270)
    expected = np.asarray(load_rgb(turned))
    assert np.array_equal(np.asarray(load_rgb(str(file))), expected)
    assert np.array_equal(np.asarray(load_rgb(file.read_bytes())), expected)


def test_damaged_metadata_does_not_make_an_image_unreadable(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "odd.png"
    sample("RGB").save(file, exif=exif)
    content = file.read_bytes()
    start = content.index(b"eXIf")
    length = struct.unpack(">I", content[start - 4 : start])[0]
    chunk = b"eXIfZZZZ" + content[start + 8 : start + 4 + length]
    content = content[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[start + 8 + length :]
    file.write_bytes(content)
    assert np.array_equal(np.asarray(load_rgb(str(file))), np.asarray(sample("RGB")))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf<!DOCTYPE html>\n<html>404", "the content is text, not an image: <!DOCTYPE html> <html>404"),
        ("ä".encode() * 40, f"the content is text, not an image: {'ä' * 32}"),
        (bytes(range(256)), "not an image of a known format"),
    ],
)
def test_an_unknown_file_is_described_by_its_content(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(content)
    for source in (str(tmp_path / "photo.jpg"), content):
        with pytest.raises(UnreadableImageError) as caught:
            load_rgb(source, "photo.jpg")
        assert str(caught.value) == f"photo.jpg: {said}"


def test_a_missing_file_is_named_once() -> None:
    with pytest.raises(UnreadableImageError) as caught:
        load_rgb("no/photo.jpg")
    assert str(caught.value) == "no/photo.jpg: No such file or directory"


@pytest.mark.parametrize("cell", [None, "", {"path": None, "bytes": None}, [[[0, 0, 0]]]])
def test_a_cell_without_an_image_is_named(cell: object) -> None:
    with pytest.raises(UnreadableImageError, match=r"^row 3: not an image: "):
        load_rgb(from_cell(cell)[0], "row 3")


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


@pytest.mark.parametrize("mode", ["PA", "HSV", "YCbCr", "LAB"])
def test_an_opened_image_of_a_rare_mode_becomes_rgb_and_stays_as_it_was(mode: str) -> None:
    image = sample("RGB").convert(mode)
    before = image.copy()
    assert np.array_equal(np.asarray(load_rgb(image)), np.asarray(image.convert("RGB")))
    assert image == before


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
def test_deep_tiffs_are_scaled_too(kind: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 320).reshape(16, 20).astype(kind)
    Image.fromarray(ramp).save(tmp_path / "deep.tiff")
    assert np.array_equal(np.asarray(load_rgb(str(tmp_path / "deep.tiff")))[..., 1], ramp >> 8)


def test_exif_that_pillow_cannot_write_back_turns_an_image_all_the_same() -> None:
    """ImageOps.exif_transpose writes the EXIF block anew, and fails with struct.error on a tag of the wrong type."""
    entries = [(0x0103, 2, 1, b"\7\0\0\0"), (0x0112, 3, 1, b"\6\0\0\0")]
    block = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    file = io.BytesIO()
    sample("RGB").save(file, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\2\0" + block + bytes(4))
    turned = load_rgb(file.getvalue(), "phone.png")
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(sample("RGB")), -1))
    assert load_rgb(turned) == turned, "it is not turned again"


def photograph(size: tuple[int, int], orientation: int = 1, mode: str = "RGB") -> bytes:
    """A smooth JPEG, of which no pixel says more than its neighbours."""
    column, row = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    pixels = np.stack([128 + 100 * np.sin(column / 40), 128 + 100 * np.sin(row / 30), (column + row) / 8], -1)
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


def part_of(
    content: bytes | Image.Image | np.ndarray, box: tuple[int, int, int, int], least: tuple[int, int]
) -> np.ndarray:
    with opened(content, "x.jpg") as picture:
        return picture.part(box, least)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_is_cut_out_of_the_upright_image(orientation: int, mode: str) -> None:
    content = photograph((90, 61), orientation, mode)
    upright = load_rgb(content)
    with opened(content) as picture:
        assert picture.size == upright.size == ((90, 61) if orientation < 5 else (61, 90))
    for box, least in (((5, 9, 47, 60), (32, 20)), ((0, 0, *upright.size), (40, 33)), ((10, 20, 30, 30), (64, 50))):
        expected = np.asarray(upright.crop(box))
        assert np.array_equal(part_of(content, box, least), expected)
        assert np.array_equal(part_of(upright, box, least), expected)
        assert np.array_equal(part_of(np.asarray(upright), box, least), expected)
    assert np.array_equal(np.asarray(load_rgb(np.asarray(upright))), np.asarray(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("box", "scale"), [((100, 50, 901, 601), 4), ((0, 0, 1003, 701), 4), ((300, 200, 811, 633), 2)]
)
def test_of_a_large_jpeg_fewer_pixels_are_decoded(box: tuple[int, int, int, int], scale: int, orientation: int) -> None:
    """They show what the whole image shows there, to what a box rounded to fewer pixels changes."""
    width, height = (1003, 701)
    content = photograph((width, height) if orientation < 5 else (height, width), orientation)
    with opened(content) as picture:
        assert picture.size == (width, height)
        found = picture.part(box, (180, 120))
        decoded = picture._image.size  # type: ignore[attr-defined]
    assert decoded in [(-(-one // scale), -(-other // scale)) for one, other in ((width, height), (height, width))]
    expected = load_rgb(content).crop(box).resize(found.shape[1::-1], Image.Resampling.BOX)
    difference = np.abs(found.astype(int) - np.asarray(expected))
    assert difference.max() <= 3 * scale
    assert difference.mean() < scale
    assert np.array_equal(part_of(content, box, (180, 120)), found), "the same each time"


def test_no_part_is_decoded_to_fewer_pixels_than_it_is_to_have() -> None:
    content = photograph((800, 600))
    for width in (98, 99, 100, 198, 199, 200, 398, 399, 400, 900):
        for left in range(8):
            part = part_of(content, (left, 1, left + 792, 593), (width, 73))
            assert part.shape[1] >= min(width, 792)
            assert part.shape[1] < 2 * width + 4 or part.shape[1] == 99


def test_a_damaged_jpeg_is_named_when_a_part_of_it_is_asked_for() -> None:
    content = photograph((900, 700))
    with opened(content[:-2000], "cut.jpg") as picture, pytest.raises(UnreadableImageError, match=r"^cut\.jpg: "):
        picture.part((0, 0, 100, 100), (100, 100))
    with opened(content[:-2000], "cut.jpg") as picture, pytest.raises(UnreadableImageError, match=r"^cut\.jpg: "):
        picture.part((0, 0, 900, 700), (100, 100))
    with opened(content[:-2000], "cut.jpg") as picture, pytest.raises(UnreadableImageError, match=r"^cut\.jpg: "):
        picture.whole()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_what_is_no_file_is_unreadable_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UnreadableImageError, match=r"x\.png: not a file$"):
        load_rgb(str(path))


def test_cells_of_datasets_give_source_and_name() -> None:
    image = sample("RGB")
    assert from_cell({"path": "a.png", "bytes": None}) == ("a.png", "a.png")
    assert from_cell({"path": "a.png", "bytes": b"x"}) == (b"x", "a.png")
    assert from_cell({"path": None, "bytes": b"x"}) == (b"x", "")
    assert from_cell("a.png") == ("a.png", "a.png")
    assert from_cell(image) == (image, "")


def test_a_palette_with_transparency_agrees_with_transformers(tmp_path: Path) -> None:
    file = str(tmp_path / "clear.png")
    sample("P").save(file, transparency=3)
    with Image.open(file) as image:
        assert image.mode == "P"
        assert "transparency" in image.info
    assert np.array_equal(np.asarray(load_rgb(file)), np.asarray(load_image(file)))
