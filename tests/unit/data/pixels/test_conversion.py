"""Transparent and deep images as 8-bit RGB, and opaque 8-bit images, which no conversion changes."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from lora_dist_testing.tiny import make_folder, make_image
from PIL import Image, features

from lora_dist.data.cache.image_cache import cached
from lora_dist.data.pixels.conversion import AS_TRANSFORMERS, Conversion
from lora_dist.data.pixels.images import find_pixel_range, load_rgb, opened
from lora_dist.data.sources.load import load_data
from lora_dist.settings.train import DataSettings

WHITE = (255, 255, 255)
ON_WHITE = Conversion(WHITE)
CONVERSIONS = (AS_TRANSFORMERS, ON_WHITE, Conversion((0, 128, 255), (0.0, 4095.0)), Conversion(WHITE, None, True))


def icon(mode: str) -> Image.Image:
    """A black disk on a transparent background; its edge is opaque."""
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[4:12, 4:12, 3] = 255
    image = Image.fromarray(pixels)
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    indexed = np.where(pixels[..., 3] > 0, 0, 255).astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(indexed // 255, "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        return image
    return Image.fromarray(indexed).convert(mode)


def save(mode: str, file: Path) -> str:
    image = icon(mode)
    extra = {"P": {"transparency": 1}, "L": {"transparency": 255}, "RGB": {"transparency": WHITE}}.get(mode, {})
    image.save(file, **({"lossless": True} if file.suffix == ".webp" else extra))
    return str(file)


@pytest.mark.parametrize("background", [WHITE, (0, 0, 0), (12, 200, 99)])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGBA", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("L", "png"),
        ("RGB", "png"),
        ("RGBA", "webp"),
        ("RGBA", "tiff"),
    ],
)
def test_every_kind_of_transparency_shows_the_background(
    mode: str, suffix: str, background: tuple[int, int, int], tmp_path: Path
) -> None:
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow cannot write webp")
    file = save(mode, tmp_path / f"icon.{suffix}")
    expected = np.full((16, 16, 3), background, dtype=np.uint8)
    expected[4:12, 4:12] = 0
    conversion = Conversion(background)
    assert np.array_equal(np.asarray(load_rgb(file, conversion=conversion)), expected)
    assert np.array_equal(np.asarray(load_rgb(Path(file).read_bytes(), "bytes", conversion)), expected)
    with opened(file, conversion=conversion) as picture:
        assert np.array_equal(picture.part((0, 0, 16, 16), (16, 16)), expected)


def _png(samples: np.ndarray, depth: int, color_type: int, transparent: bytes) -> bytes:
    """A PNG file of rows [h, w, channels] with a transparent color; Pillow writes none of fewer or more than 8 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b""
    for row in samples.reshape(len(samples), -1):
        bits = "".join(format(value, f"0{depth}b") for value in row)
        rows += b"\0" + int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    height, width = samples.shape[:2]
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("depth", "color_type"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_the_transparent_color_of_a_png_of_any_depth_shows_the_background(depth: int, color_type: int) -> None:
    top, channels = 2**depth - 1, 1 + color_type
    for key in {0, 1, top // 3, top}:
        # For 16 bits, colors that are different in 8 bits.
        key, other = key * (257 if key == 1 and depth == 16 else 1), 0 if key else top
        samples = np.full((5, 3, channels), other)
        samples[1:3, 1:] = key
        content = _png(samples, depth, color_type, struct.pack(f">{channels}H", *[key] * channels))
        expected = np.full((5, 3, 3), 255 if other else 0)
        expected[1:3, 1:] = (12, 200, 99)
        conversion = Conversion((12, 200, 99), (0, 65535), all_depths=True)
        assert np.array_equal(np.asarray(load_rgb(content, conversion=conversion)), expected), key
        with opened(content, conversion=conversion) as picture:
            assert np.array_equal(picture.part((1, 1, 3, 3), (2, 2)), expected[1:3, 1:])


def test_the_transparent_color_of_a_deep_image_is_no_part_of_the_range() -> None:
    samples = np.full((4, 4, 1), 65535)
    samples[1:3] = np.arange(8).reshape(2, 4, 1)
    content = _png(samples, 16, 0, struct.pack(">H", 65535))
    shown = ON_WHITE._replace(all_depths=True)
    assert find_pixel_range([(content, "icon")], shown) == pytest.approx((0, 7), abs=0.01)
    assert find_pixel_range([(_png(samples[:1], 16, 0, struct.pack(">H", 65535)), "icon")], shown) is None


@pytest.mark.parametrize("conversion", [AS_TRANSFORMERS._replace(all_depths=True), ON_WHITE])
def test_a_transparent_color_that_is_shown_as_it_is_counts_for_the_range(conversion: Conversion) -> None:
    """With `--transparent_background ignore`, and as older releases did."""
    samples = np.full((4, 4, 1), 65535)
    samples[1:3] = np.arange(8).reshape(2, 4, 1)
    content = _png(samples, 16, 0, struct.pack(">H", 65535))
    low, high = find_pixel_range([(content, "icon")], conversion)
    assert (low, high) == pytest.approx((0, 65535), abs=0.2)
    shown = np.asarray(load_rgb(content, conversion=conversion._replace(pixel_range=(low, high))))
    assert (shown[0, 0, 0], shown[1, 0, 0]) == (255, 0)


def test_a_bundle_of_an_older_release_goes_on_to_ignore_the_transparent_color_of_other_depths() -> None:
    content = _png(np.full((2, 2, 1), 3), 2, 0, struct.pack(">H", 3))
    assert Conversion.of({"transparent_background": [0, 0, 0], "pixel_range": None}).all_depths is False
    assert load_rgb(content, conversion=Conversion((0, 0, 0))).getpixel((0, 0)) == WHITE
    assert "all_depths" not in ON_WHITE.record()


def test_half_transparent_pixels_are_mixed_with_the_background() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert load_rgb(image, conversion=ON_WHITE).getpixel((0, 0)) == (127, 127, 127)


def test_transparency_survives_a_turn_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    icon("L").save(tmp_path / "turned.png", transparency=255, exif=exif)
    assert np.asarray(load_rgb(str(tmp_path / "turned.png"), conversion=Conversion((1, 2, 3))))[0, 0].tolist() == [
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "jpg"),
        ("L", "png"),
        ("P", "gif"),
        ("P", "png"),
        ("CMYK", "jpg"),
        ("RGB", "jpg"),
        ("RGB", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
    ],
)
def test_opaque_images_of_eight_bits_are_the_same_with_every_conversion(mode: str, suffix: str, tmp_path: Path) -> None:
    image = make_image(1, 2)
    file = str(tmp_path / f"opaque.{suffix}")
    (
        image.quantize(16)
        if mode == "P"
        else image.convert("RGB").convert("L").convert(mode)
        if mode == "LA"
        else image.convert(mode)
    ).save(file)
    loaded = [np.asarray(load_rgb(file, conversion=conversion)) for conversion in CONVERSIONS]
    assert all(np.array_equal(one, loaded[0]) for one in loaded)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (np.linspace(0, 4095, 256).astype("<u2"), "png"),
        (np.linspace(0, 4095, 256).astype("<u2"), "tiff"),
        (np.linspace(0, 4095, 256).astype(">u2"), "tiff"),
        (np.linspace(-2e6, 2e6, 256).astype("<i4"), "tiff"),
        (np.linspace(0, 1, 256).astype("<f4"), "tiff"),
    ],
)
def test_deep_images_are_scaled_by_the_range_of_the_data(pixels: np.ndarray, suffix: str, tmp_path: Path) -> None:
    file = str(tmp_path / f"deep.{suffix}")
    Image.fromarray(pixels.reshape(16, 16)).save(file)
    found = find_pixel_range([(file, file)], ON_WHITE)
    assert found is not None
    assert found[0] == pytest.approx(float(pixels[0]), abs=0.01 * np.ptp(pixels.astype(float)))
    assert found[1] == pytest.approx(float(pixels[-1]), abs=0.01 * np.ptp(pixels.astype(float)))
    shown = np.asarray(load_rgb(file, conversion=Conversion(WHITE, found)))
    assert np.abs(shown[..., 0].ravel() - np.arange(256.0)).max() <= 2
    assert np.ptp(shown, axis=-1).max() == 0


def test_values_outside_the_range_are_clipped_and_nan_is_zero(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-9.0, 0.5, 7.0, np.nan]], dtype=np.float32)).save(tmp_path / "f.tiff")
    loaded = load_rgb(str(tmp_path / "f.tiff"), conversion=Conversion(None, (0.0, 1.0)))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 128, 255, 0]


def test_a_range_comes_from_deep_images_alone(tmp_path: Path) -> None:
    make_image(0, 0).save(tmp_path / "photo.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.fromarray(np.full((4, 4), 7, dtype=np.uint16)).save(tmp_path / "constant.png")
    names = [(str(tmp_path / name), name) for name in ("photo.png", "bad.png", "constant.png")]
    assert find_pixel_range(names[:2], ON_WHITE) is None
    assert find_pixel_range(names, ON_WHITE) == (7.0, 8.0)


def test_a_deep_image_without_a_range_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_dist.data.pixels.images._warned", set())
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(tmp_path / "deep.png")
    for _ in range(2):
        load_rgb(str(tmp_path / "deep.png"))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(str(tmp_path / "deep.png"))
    assert "mode I;16" in message


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_record_gives_the_same_conversion_again(conversion: Conversion) -> None:
    assert Conversion.of(json.loads(json.dumps(conversion.record()))) == conversion


@pytest.mark.parametrize(
    "record",
    [
        {"transparent_background": [1, 2]},
        {"transparent_background": [0, 0, 256]},
        {"pixel_range": [1, 1]},
        {"pixel_range": [0, "a"]},
        {"transparent_background": 5},
    ],
)
def test_a_damaged_record_is_refused(record: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Conversion.of(record)


def test_the_cache_of_one_conversion_is_not_read_by_another(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            save("RGBA", tmp_path / "train" / name / f"{number}.png")
    split = load_data(DataSettings(train_dir=str(tmp_path / "train")), 0).train
    shown = {}
    for conversion in (AS_TRANSFORMERS, ON_WHITE):
        reader = cached(split, str(tmp_path / "cache"), (32, 32), True, conversion).reader()
        shown[conversion] = reader.read(0, [0])[0].source[0, 0, 0]
    assert shown == {AS_TRANSFORMERS: 0, ON_WHITE: 255}
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_range_of_a_split_is_that_of_evenly_spaced_images(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(40):
            value = 100 * (number + 1) + 5000 * (name == "b")
            Image.fromarray(np.full((8, 8), value, dtype=np.uint16)).save(tmp_path / name / f"{number:02}.png")
    split = load_data(DataSettings(train_dir=str(tmp_path)), 0).train
    low, high = split.pixel_range(ON_WHITE)
    assert low < 500
    assert high > 8500
    assert split.pixel_range(ON_WHITE) == (low, high)


def test_a_folder_of_photographs_has_no_range(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", per_class=3)
    assert load_data(DataSettings(train_dir=str(tmp_path / "photos")), 0).train.pixel_range(ON_WHITE) is None
