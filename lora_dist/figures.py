"""Pictures for people: grids of captioned images and the confusion matrix, drawn with Pillow."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "Arial.ttf",
          "NotoSansCJK-Regular.ttc", "msgothic.ttc", "AppleSDGothicNeo.ttc")  # fmt: skip
"""Fonts of Linux, Windows and macOS, for texts of which Pillow's own lacks letters."""
_NOBODY = "\U0010ffff"
"""What no font has."""
INK, PAPER, MUTED = (30, 30, 30), (255, 255, 255), (120, 120, 120)


def to_images(pixel_values: Tensor) -> list[Image.Image]:
    """Model inputs [B, 3, H, W] as pictures, each stretched to its own range, whatever its normalisation."""
    low = pixel_values.amin(dim=(1, 2, 3), keepdim=True)
    high = pixel_values.amax(dim=(1, 2, 3), keepdim=True)
    scaled = ((pixel_values - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in scaled.permute(0, 2, 3, 1).cpu().numpy()]


def grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """Images in rows, each with a caption of one or two lines below it."""
    font = _font(12, captions)
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
        resample = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
        resized = image.resize(size, resample)
        sheet.paste(resized, (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2))
        for line, text in enumerate(caption.split("\n")[:2]):
            draw.text((left, top + cell + 2 + 15 * line), _fitted(draw, text, font, cell), fill=INK, font=font)
    return sheet


def confusion_picture(counts: np.ndarray, labels: Sequence[str], side: int = 720) -> Image.Image:
    """Rows are true classes, columns predictions, shades the share of the row; numbers where there is room."""
    classes = len(labels)
    # Pillow measures one line at a time, and a class may have a line break in its name.
    labels = [" ".join(label.split()) for label in labels]
    cell = max(4, side // classes)
    font = _font(max(9, min(14, cell // 2)), labels)
    title = ImageFont.load_default(14)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    named = cell >= 11
    margin = min(160, int(max(measure.textlength(label, font) for label in labels)) + 10) if named else 10
    top = margin + 24
    picture = Image.new("RGB", (24 + margin + cell * classes + 8, top + cell * classes + 8), PAPER)
    draw = ImageDraw.Draw(picture)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    left = 24 + margin
    for row in range(classes):
        for column in range(classes):
            share = float(shares[row, column])
            x, y = left + column * cell, top + row * cell
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=_shade(share, row == column))
            if cell >= 24 and counts[row, column]:
                color = PAPER if share > 0.5 else INK
                middle = (x + cell / 2, y + cell / 2)
                draw.text(middle, str(counts[row, column]), fill=color, font=font, anchor="mm")
        if named:
            text = _fitted(draw, labels[row], font, margin - 8)
            draw.text((left - 5, top + row * cell + cell / 2), text, fill=INK, font=font, anchor="rm")
            _upright(picture, text, font, (left + row * cell + cell // 2, top - 5))
    draw.text((left, 4), "predicted", fill=MUTED, font=title)
    _upright(picture, "true", title, (12, top + 40), MUTED)
    return picture


def _font(size: int, texts: Sequence[str]) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, which is the same everywhere; or the first of the system's that lacks fewer letters."""
    letters = {letter for text in texts for letter in text if not letter.isspace()}
    fonts = [ImageFont.load_default(size)]
    for name in _FONTS if _lacks(fonts[0], letters) else ():
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return min(fonts, key=lambda font: _lacks(font, letters))


def _lacks(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, letters: set[str]) -> int:
    """How many letters it draws as it draws what it does not have."""
    nothing = bytes(font.getmask(_NOBODY))
    return sum(bytes(font.getmask(letter)) == nothing for letter in letters)


def _shade(share: float, right: bool) -> tuple[int, int, int]:
    full = (23, 84, 150) if right else (176, 42, 32)
    depth = share**0.5
    red, green, blue = (round(247 + (value - 247) * depth) for value in full)
    return red, green, blue


def _upright(
    picture: Image.Image,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    bottom: tuple[int, int],
    color: tuple[int, int, int] = INK,
) -> None:
    """Text turned by a quarter, its lower end centred at `bottom`."""
    left, top, right, low = font.getbbox(text)
    label = Image.new("RGB", (max(1, int(right - left)), max(1, int(low - top))), PAPER)
    ImageDraw.Draw(label).text((-left, -top), text, fill=color, font=font)
    turned = label.rotate(90, expand=True)
    picture.paste(turned, (bottom[0] - turned.width // 2, bottom[1] - turned.height))


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
