"""The picture of a sweep: the metric of each trial in order, and over each searched setting. Drawn with Pillow."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState
from PIL import Image, ImageDraw, ImageFont

from lora_dist.settings.sweep import Axis
from lora_dist.sweep.study import Sweep, ended_as

INK, PAPER, MUTED, GRID = (30, 30, 30), (255, 255, 255), (110, 110, 110), (228, 228, 228)
_STYLES = {"pruned": ((150, 150, 150), False), "complete": ((23, 84, 150), True), "best": ((176, 42, 32), True)}
"""Color of a dot, and whether it is filled; from the lowest to the topmost dots."""
COLUMNS = 3
WIDTH, HEIGHT = 330, 250
"""Of a panel with its labels, in pixels."""
MOST_TICKS = 12
_LEFT, _RIGHT, _TOP, _LOW = 60, 20, 32, 30
_DOT = 4


class _Scale(NamedTuple):
    """Maps values to 0 .. 1: numbers of a range, in powers if `log`, or choices by their order.

    `ticks` are the values with a label.
    """

    low: float
    high: float
    ticks: Sequence[Any]
    log: bool = False
    choices: Sequence[Any] = ()

    @classmethod
    def of(cls, axis: Axis) -> "_Scale":
        if axis.choices:
            return cls(-0.5, len(axis.choices) - 0.5, axis.choices, choices=axis.choices)
        return cls.between(axis.low, axis.high, axis.log)

    @classmethod
    def between(cls, low: float, high: float, log: bool = False) -> "_Scale":
        parts = [part / 4 for part in range(5)]
        ticks = [low * (high / low) ** part if log else low + (high - low) * part for part in parts]
        return cls(low, high, ticks, log)

    def place(self, value: Any) -> float:
        number = self.choices.index(value) if self.choices else value
        low, high, number = (math.log(one) if self.log else one for one in (self.low, self.high, number))
        return (number - low) / (high - low)


class _Panel:
    """A diagram with a frame, labels and a grid."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, box: tuple[int, int, int], heading: str, x: _Scale, y: _Scale
    ) -> None:
        left, top, width = box
        self._draw, self._x, self._y = draw, x, y
        self._box = (left + _LEFT, top + _TOP, left + width - _RIGHT, top + HEIGHT - _LOW)
        small, title = ImageFont.load_default(11), ImageFont.load_default(14)
        for value in y.ticks:
            _, height = self.at(None, value)
            draw.line((self._box[0], height, self._box[2], height), fill=GRID)
            draw.text((self._box[0] - 6, height), f"{value:.3g}", fill=MUTED, font=small, anchor="rm")
        for value in x.ticks:
            place, _ = self.at(value, None)
            draw.line((place, self._box[3], place, self._box[3] + 4), fill=MUTED)
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            draw.text((place, self._box[3] + 7), text, fill=MUTED, font=small, anchor="ma")
        draw.rectangle(self._box, outline=MUTED)
        draw.text((self._box[0], top + 9), heading, fill=INK, font=title)

    def at(self, x: Any, y: float | None) -> tuple[int, int]:
        """Pixels of a point; its left or lower end for None."""
        left, top, right, low = self._box
        across, up = 0 if x is None else self._x.place(x), 0 if y is None else self._y.place(y)
        return round(left + across * (right - left)), round(low - up * (low - top))

    def dots(self, trials: Sequence[FrozenTrial], places: Sequence[Any], best: FrozenTrial) -> None:
        """Draws trials at their places across; those that were pruned below the others, and the best one on top."""
        for style, look in _STYLES.items():
            for trial, x in zip(trials, places, strict=True):
                if style == ("best" if trial.number == best.number else ended_as(trial)):
                    _dot(self._draw, self.at(x, trial.value), *look)


def sweep_picture(sweep: Sweep) -> Image.Image:
    """Draws the metric over the number of the trial, and over each axis in a panel of its own.

    Args:
        sweep: with a complete trial at least.
    """
    axes, best = sweep.axes, sweep.best_first()[0]
    trials = [trial for trial in sweep.ended() if trial.value is not None and math.isfinite(trial.value)]
    values, last = [trial.values[0] for trial in trials], trials[-1].number
    margin = 0.06 * (max(values) - min(values)) or 0.06 * abs(values[0]) or 1.0
    y = _Scale.between(min(values) - margin, max(values) + margin)
    columns = min(COLUMNS, len(axes))
    picture = Image.new("RGB", (max(2, columns) * WIDTH, (1 + -(-len(axes) // columns)) * HEIGHT), PAPER)
    draw = ImageDraw.Draw(picture)
    order = _Scale(-0.5, last + 0.5, range(0, last + 1, 1 + last // MOST_TICKS))
    history = _Panel(draw, (0, 0, picture.width), f"{sweep.metric} by trial, and the best so far", order, y)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    so_far = accumulate((trial.values[0] for trial in complete), min if sweep.metric == "loss" else max)
    line = [history.at(trial.number, value) for trial, value in zip(complete, so_far, strict=True)]
    draw.line(line, fill=_STYLES["best"][0])
    history.dots(trials, [trial.number for trial in trials], best)
    _draw_legend(draw, picture.width - _RIGHT)
    for number, axis in enumerate(axes):
        box = number % columns * WIDTH, (1 + number // columns) * HEIGHT, WIDTH
        panel = _Panel(draw, box, axis.name, _Scale.of(axis), y)
        panel.dots(trials, [trial.params[axis.name] for trial in trials], best)
    return picture


def _draw_legend(draw: ImageDraw.ImageDraw, right: int) -> None:
    font = ImageFont.load_default(12)
    for name, (color, filled) in reversed(_STYLES.items()):
        draw.text((right, 18), name, fill=INK, font=font, anchor="rm")
        right -= round(font.getlength(name)) + 12
        _dot(draw, (right, 18), color, filled)
        right -= 18


def _dot(draw: ImageDraw.ImageDraw, place: tuple[int, int], color: tuple[int, int, int], filled: bool) -> None:
    x, y = place
    draw.ellipse((x - _DOT, y - _DOT, x + _DOT, y + _DOT), fill=color if filled else PAPER, outline=color, width=2)
