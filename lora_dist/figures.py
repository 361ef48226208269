"""Grids of captioned images, confusion matrices and reliability diagrams, drawn with Pillow."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, PAPER, MUTED = (30, 30, 30), (255, 255, 255), (120, 120, 120)
RIGHT, WRONG = (23, 84, 150), (176, 42, 32)
MAX_CLASSES = 50
"""Classes in a confusion matrix; of more, the most confused ones are shown."""


def to_images(pixel_values: Tensor) -> list[Image.Image]:
    """Converts model inputs [B, 3, H, W] to images, each stretched to its own range of values."""
    low = pixel_values.amin(dim=(1, 2, 3), keepdim=True)
    high = pixel_values.amax(dim=(1, 2, 3), keepdim=True)
    scaled = ((pixel_values - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """Draws images in cells of `cell` pixels, each with a caption of one or two lines below it."""
    font = ImageFont.load_default(12)
    caption_height, gap = 34, 6
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + caption_height + gap) + gap), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = gap + index % columns * (cell + gap)
        top = gap + index // columns * (cell + caption_height + gap)
        scale = cell / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        resized = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
        sheet.paste(resized, (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2))
        for line, text in enumerate(caption.split("\n")[:2]):
            draw.text((left, top + cell + 2 + 15 * line), _fitted(text, font, cell), fill=INK, font=font)
    return sheet


def confusion_picture(confusion: np.ndarray, labels: Sequence[str], side: int = 720) -> Image.Image:
    """Draws a confusion matrix: rows are true classes, columns predictions, and shades the share of the row.

    Args:
        confusion: rows of true class, predicted class and number of samples [K, 3]. Of more than `MAX_CLASSES`
            classes, those with the most errors are shown.
        labels: class names in order.
        side: width of the cells together, in pixels.
    """
    true, predicted, numbers = confusion.T
    support = np.bincount(true, weights=numbers, minlength=len(labels))
    wrong = numbers * (true != predicted)
    errors = np.bincount(true, wrong, len(labels)) + np.bincount(predicted, wrong, len(labels))
    shown = np.sort(np.argsort(-errors, kind="stable")[:MAX_CLASSES])
    found = {(int(a), int(b)): int(number) for a, b, number in confusion}
    cell = side // len(shown)
    font, title = ImageFont.load_default(max(9, min(14, cell // 2))), ImageFont.load_default(14)
    names = [_fitted(labels[index], font, 152) for index in shown]
    margin = int(max(font.getlength(name) for name in names)) + 10
    left, top = 24 + margin, margin + 24
    picture = Image.new("RGB", (left + cell * len(shown) + 8, top + cell * len(shown) + 8), PAPER)
    draw = ImageDraw.Draw(picture)
    for row, true_class in enumerate(shown):
        y = top + row * cell
        for column, predicted_class in enumerate(shown):
            count = found.get((int(true_class), int(predicted_class)), 0)
            x, share = left + column * cell, count / max(1.0, support[true_class])
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=_shade(share, RIGHT if row == column else WRONG))
            if cell >= 24 and count:
                middle = (x + cell / 2, y + cell / 2)
                draw.text(middle, str(count), fill=PAPER if share > 0.5 else INK, font=font, anchor="mm")
        draw.text((left - 5, y + cell / 2), names[row], fill=INK, font=font, anchor="rm")
        _draw_upright(picture, names[row], font, (left + row * cell + cell // 2, top - 5), INK)
    all_shown = len(shown) == len(labels)
    heading = "predicted" if all_shown else f"predicted (the {len(shown)} most confused of {len(labels)} classes)"
    draw.text((left, 4), heading, fill=MUTED, font=title)
    _draw_upright(picture, "true", title, (12, top + 40), MUTED)
    return picture


def reliability_picture(panels: Mapping[str, Sequence[tuple[float, float, int]]], side: int = 320) -> Image.Image:
    """Draws reliability diagrams (https://arxiv.org/abs/1706.04599) next to each other.

    A bar is the accuracy in an interval of confidence; on the diagonal it equals the confidence. Its shade shows the
    interval's share of the samples.

    Args:
        panels: by heading, mean confidence, accuracy and number of samples in each of equal intervals of confidence.
        side: width of a diagram, in pixels.
    """
    font, margin = ImageFont.load_default(12), 44
    picture = Image.new("RGB", (len(panels) * (side + margin) + 14, side + 2 * margin), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (heading, bins) in enumerate(panels.items()):
        left, low = margin + number * (side + margin), margin + side
        largest = max(1, *(count for *_, count in bins))
        for index, (_, accuracy, count) in enumerate(bins):
            if count:
                first, end = (left + round(side * place / len(bins)) for place in (index, index + 1))
                bar = (first, low - round(side * accuracy), end - 1, low)
                draw.rectangle(bar, fill=_shade(0.15 + 0.85 * count / largest, RIGHT))
        for tick in range(6):
            place = round(side * tick / 5)
            draw.text((left + place, low + 4), f"{tick / 5:.1f}", fill=MUTED, font=font, anchor="ma")
            draw.text((left - 4, low - place), f"{tick / 5:.1f}", fill=MUTED, font=font, anchor="rm")
        draw.rectangle((left, margin, left + side, low), outline=MUTED)
        draw.line((left, low, left + side, margin), fill=WRONG, width=2)
        draw.text((left, margin - 20), _fitted(heading, font, side), fill=INK, font=font)
        draw.text((left + side, low + 20), "confidence", fill=MUTED, font=font, anchor="ra")
        draw.text((left + 4, margin + 4), "accuracy", fill=MUTED, font=font)
    return picture


def _fitted(text: str, font: Any, width: int) -> str:
    """Text on one line, in the ASCII of Pillow's own font and cut to a width in pixels.

    Accents are dropped; other letters become question marks.
    """
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    text = plain.encode("ascii", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _shade(share: float, full: tuple[int, int, int]) -> tuple[int, ...]:
    depth = share**0.5
    return tuple(round(247 + (value - 247) * depth) for value in full)


def _draw_upright(picture: Image.Image, text: str, font: Any, bottom: tuple[int, int], color: tuple[int, ...]) -> None:
    """Draws text turned by a quarter, with its lower end centred at `bottom`."""
    left, top, right, low = font.getbbox(text)
    label = Image.new("RGB", (max(1, int(right - left)), max(1, int(low - top))), PAPER)
    ImageDraw.Draw(label).text((-left, -top), text, fill=color, font=font)
    turned = label.rotate(90, expand=True)
    picture.paste(turned, (bottom[0] - turned.width // 2, bottom[1] - turned.height))
