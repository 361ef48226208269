"""Image grids and confusion matrices: sizes, positions and colours, for any number of images and classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora_dist import figures
from lora_dist.figures import PAPER, grid, to_images


def confusion_picture(counts: np.ndarray, labels: list[str], **more: int) -> Image.Image:
    """The picture of a whole matrix."""
    true, predicted = np.nonzero(counts)
    return figures.confusion_picture(np.column_stack([true, predicted, counts[true, predicted]]), labels, **more)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_model_inputs_become_pictures_whatever_their_normalisation() -> None:
    ramp = torch.linspace(-2, 2, 4 * 6).reshape(1, 1, 4, 6).expand(1, 3, 4, 6)
    for values in (ramp, ramp * 100 + 7, ramp / 50):
        (picture,) = to_images(values)
        assert picture.size == (6, 4)
        assert pixels(picture)[..., 0].tolist() == pixels(to_images(ramp)[0])[..., 0].tolist()
        assert (pixels(picture).min(), pixels(picture).max()) == (0, 255)


def test_a_blank_input_is_a_blank_picture() -> None:
    (picture,) = to_images(torch.full((1, 3, 4, 4), 0.3))
    assert len(np.unique(pixels(picture))) == 1


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24])
def test_a_grid_shows_every_image_in_its_place(count: int) -> None:
    """Images of one colour each, of odd shapes, with captions of several lines and a long one."""
    images = [Image.new("RGB", (20 + 60 * (number % 2), 50), (10 * number, 0, 255)) for number in range(count)]
    sheet = grid(images, [f"{number}\nsecond line\nthird" + "x" * 80 for number in range(count)], columns=8, cell=40)
    columns, rows = min(8, count), -(-count // 8)
    assert sheet.size == (columns * 46 + 6, rows * 80 + 6)
    for number in range(count):
        x, y = 6 + number % 8 * 46 + 20, 6 + number // 8 * 80 + 20
        assert sheet.getpixel((x, y)) == (10 * number, 0, 255)


def test_captions_are_drawn_and_stay_below_their_image() -> None:
    image = Image.new("RGB", (40, 40), (0, 0, 255))
    plain, named = (pixels(grid([image] * 2, [caption, ""], columns=2, cell=40)) for caption in ("", "W" * 60))
    changed = np.argwhere((plain != named).any(axis=2))
    assert len(changed) > 20
    assert changed[:, 0].min() >= 46
    assert changed[:, 1].max() < 6 + 40 + 6, "a long caption is cut off before the next image"


def test_a_caption_may_be_in_any_script() -> None:
    grid([Image.new("RGB", (8, 8))] * 2, ["émoji 🦊\nzweite Zeile", "猫\n"])


def test_accents_are_dropped_and_other_scripts_become_question_marks() -> None:
    image = Image.new("RGB", (40, 40))
    assert grid([image], ["grün Я"], cell=60) == grid([image], ["grun ?"], cell=60)
    counts = np.eye(2, dtype=int)
    assert confusion_picture(counts, ["é\nЯ", "b"]) == confusion_picture(counts, ["e ?", "b"])


def test_of_many_classes_the_most_confused_are_shown_in_order() -> None:
    counts = np.diag(np.full(80, 9))
    confused = [*range(3, 53, 2), *range(30, 80, 2)]
    counts[confused, 0], counts[0, confused] = 1, 2
    names = [f"class {number}" for number in range(80)]
    shown = sorted({0, *confused}, key=lambda index: (index != 0, index))[:50]
    assert confusion_picture(counts, names) != confusion_picture(counts[:50, :50], names[:50])
    rest = [names[index] if index in shown else "not drawn" for index in range(80)]
    assert confusion_picture(counts, rest) == confusion_picture(counts, names)


@pytest.mark.parametrize("classes", [2, 3, 40, 101, 300])
def test_the_confusion_matrix_has_a_cell_for_each_pair(classes: int) -> None:
    counts = np.zeros((classes, classes), dtype=int)
    counts[0, 0], counts[1, 0] = 5, 5
    picture = confusion_picture(counts, [f"class {number}" for number in range(classes)])
    blue, red = ((23, 84, 150), (176, 42, 32))
    drawn = pixels(picture)
    rights = np.argwhere((drawn == blue).all(axis=2))
    wrongs = np.argwhere((drawn == red).all(axis=2))
    assert len(rights)
    assert len(wrongs)
    assert wrongs[:, 0].min() > rights[:, 0].max(), "rows are true classes, from the top"
    assert (wrongs[:, 1].min(), wrongs[:, 1].max()) == (rights[:, 1].min(), rights[:, 1].max()), "columns predictions"
    assert max(picture.size) < 2000
    assert tuple(drawn[-1, -1]) == PAPER


def test_shades_are_shares_of_the_true_class_and_not_counts() -> None:
    few, many = np.array([[1, 1], [0, 2]]), np.array([[100, 100], [0, 200]])
    cells = [pixels(confusion_picture(counts, ["a", "b"], side=40)) for counts in (few, many)]
    shades = [{tuple(color) for color in cell.reshape(-1, 3)} for cell in cells]
    middle = {color for color in shades[0] if color[2] > color[0] + 20}
    assert middle
    assert middle <= shades[1]


@pytest.mark.parametrize("names", [["a" * 500, "b"], ["two\nlines", "x"], ["", " "], ["猫", "🦊"]])
def test_any_class_name_is_drawn_even_where_no_image_has_it(names: list[str]) -> None:
    picture = confusion_picture(np.zeros((2, 2), dtype=int), names)
    assert max(picture.size) < 2000
