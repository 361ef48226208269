"""Files of pixels: what was written is read, or the damage is found and named."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lora_dist.data.cache.pixel_files import DamagedFileError, PixelFile, remove_unfinished, write_pixels


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3)).astype(np.uint8)


IMAGES = [noise(5, 7), None, noise(1, 1), noise(40, 3)[::2]]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_pixels(tmp_path / "part", IMAGES)
    return tmp_path / "part"


def test_images_are_read_as_they_were_written(written: Path) -> None:
    file = PixelFile(written)
    assert len(file) == 4
    for _ in range(2):
        for index, image in enumerate(IMAGES):
            found = file[index]
            assert (found is None) == (image is None)
            assert found is None or np.array_equal(found, image)  # type: ignore[arg-type]


def test_a_file_of_no_images_is_whole(tmp_path: Path) -> None:
    write_pixels(tmp_path / "part", [])
    assert len(PixelFile(tmp_path / "part")) == 0


def as_older_release(path: Path) -> None:
    """Writes a file again as older releases wrote it, with a digest for each image and one for the index."""
    file = PixelFile(path)
    fields = [("start", "<u8"), ("height", "<u4"), ("width", "<u4"), ("digest", "<u8")]
    index, pixels = np.zeros(len(file), fields), b""
    for number, image in enumerate(file[position] for position in range(len(file))):
        image = np.empty((0, 0, 3), np.uint8) if image is None else image
        index[number] = (len(pixels), *image.shape[:2], 123456789)
        pixels += image.tobytes()
    path.write_bytes(pixels + index.tobytes() + struct.pack("<8sQQ", b"pixels01", len(file), 987654321))


def test_files_of_older_releases_are_read(written: Path) -> None:
    as_older_release(written)
    test_images_are_read_as_they_were_written(written)
    written.write_bytes(written.read_bytes()[1:])
    with pytest.raises(DamagedFileError, match="part: "):
        PixelFile(written)


def test_a_turned_byte_of_the_index_or_the_footer_is_found_or_changes_nothing(written: Path) -> None:
    whole = written.read_bytes()
    found = 0
    for index in range(sum(image.size for image in IMAGES if image is not None), len(whole)):
        written.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        try:
            test_images_are_read_as_they_were_written(written)
        except DamagedFileError:
            found += 1
    # All but the sizes of the missing image, and the end of the footer.
    assert found == 4 * 16 + 16 - 8


@pytest.mark.parametrize("size", [0, 1, 23, 24, 100, -1, -24])
def test_a_file_that_was_cut_off_is_no_file_of_pixels(size: int, written: Path) -> None:
    written.write_bytes(written.read_bytes()[:size])
    with pytest.raises(DamagedFileError, match="part: "):
        PixelFile(written)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match=r"part: .*No such file"):
        PixelFile(tmp_path / "part")


def test_nothing_is_in_place_before_all_of_it_is_there(tmp_path: Path) -> None:
    def images() -> Iterator[np.ndarray]:
        yield noise(4, 4)
        assert not (tmp_path / "part").exists()
        (left,) = tmp_path.iterdir()
        left.with_name(f"{left.name}-2").touch()
        raise KeyError

    with pytest.raises(KeyError):
        write_pixels(tmp_path / "part", images())
    assert len(list(tmp_path.iterdir())) == 1
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
