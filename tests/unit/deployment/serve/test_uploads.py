"""Uploads: images are decoded to RGB, everything else is refused with its status."""

import io
import struct
import zlib

import numpy as np
import pytest
from lora_dist_testing.tiny import make_image
from lora_dist_testing.uploads import encoded, png_of
from PIL import Image

from lora_dist.data.pixels.images import load_rgb
from lora_dist.deployment.serve.uploads import FORMATS, RefusedUploadError, check_name, decode

MAX_PIXELS = 1_000_000


def _refused(data: bytes, max_pixels: int = MAX_PIXELS) -> RefusedUploadError:
    with pytest.raises(RefusedUploadError, match=r"^odd\.png: ") as caught:
        decode(data, "odd.png", max_pixels)
    return caught.value


@pytest.mark.parametrize("format_", FORMATS)
def test_images_of_the_allowed_types_are_decoded_as_everywhere(format_: str) -> None:
    data = encoded(format_)
    assert np.array_equal(np.asarray(decode(data, "a", MAX_PIXELS)), np.asarray(load_rgb(data)))


def test_photographs_are_turned_upright() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    make_image(0, 0, (40, 32)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), "a", MAX_PIXELS).size == (32, 40)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 422),
        (encoded()[:-200], 422),
        (encoded("JPEG")[:400], 422),
        (b"no image", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>", 415),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
        (encoded("TIFF"), 415),
        (b"\x89PNG\r\n\x1a\n", 415),
        (png_of(40, 40), 422),
    ],
    ids=["empty", "truncated", "truncated jpeg", "text", "svg", "postscript", "tiff", "magic number", "no pixels"],
)
def test_what_is_no_whole_image_of_an_allowed_type_is_refused(data: bytes, status: int) -> None:
    assert _refused(data).status == status


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1_000_001, 1)])
def test_too_many_pixels_are_refused_before_they_are_decoded(width: int, height: int) -> None:
    """There are none in these files: whoever decoded them would find that first, and answer 422."""
    assert _refused(png_of(width, height)).status == 413


def test_the_largest_limit_that_can_be_set_is_kept_to() -> None:
    """What is not too large is decoded, and found to have no pixels."""
    assert _refused(png_of(17_800, 10_000), 178_000_000).status == 422
    assert _refused(png_of(17_801, 10_000), 178_000_000).status == 413


def test_as_many_pixels_as_allowed_are_fine() -> None:
    assert decode(png_of(1000, 1000, bytes(1001 * 1000)), "a", MAX_PIXELS).size == (1000, 1000)


def test_a_bomb_in_the_text_of_a_png_is_refused() -> None:
    bomb = zlib.compress(bytes(100_000_000))
    content = b"Comment\0\0" + bomb
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    whole = encoded()
    assert _refused(whole[:33] + chunk + whole[33:]).status == 422


def test_no_damage_to_an_upload_raises_anything_else() -> None:
    whole = encoded("JPEG")
    random = np.random.default_rng(0)
    statuses = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for index in random.integers(0, len(whole), 4):
            damaged[index] = random.integers(256)
        try:
            decode(bytes(damaged), "x", MAX_PIXELS)
        except RefusedUploadError as error:
            statuses.add(error.status)
    assert statuses <= {413, 415, 422}
    assert statuses


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "C:\\boot.ini", "a\0.png", "a\nb", "", ".", "..", "x" * 256]
)
def test_a_name_with_a_path_in_it_is_refused(name: str) -> None:
    with pytest.raises(RefusedUploadError, match="not a plain file name") as caught:
        check_name(name)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["a.jpg", "two words.png", "émoji 🦊.webp", "<b>.png", "..a", "x" * 255])
def test_any_other_name_is_fine(name: str) -> None:
    assert check_name(name) == name
