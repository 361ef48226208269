"""The picture of a sweep: the metric of each trial in order, and over each searched setting."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from lora_dist.settings.sweep import Axis
from lora_dist.sweep.study import Sweep, ended_as

COLUMNS = 3
WIDTH, HEIGHT = 3.4, 2.5
"""Size of a panel in inches."""
_COLORS = {"pruned": "tab:gray", "complete": "tab:blue", "best": "tab:red"}
"""Color of the dots of a group; later groups cover earlier ones."""


def plot_sweep(sweep: Sweep) -> Figure:
    """Draws the metric over the number of the trial, and over each axis in a panel of its own.

    Args:
        sweep: a sweep with at least one complete trial.
    """
    trials = [trial for trial in sweep.ended() if trial.value is not None and math.isfinite(trial.value)]
    columns = max(2, min(COLUMNS, len(sweep.axes)))
    rows = 1 + math.ceil(len(sweep.axes) / columns)
    figure = Figure(figsize=(columns * WIDTH, rows * HEIGHT), layout="constrained")
    places = figure.add_gridspec(rows, columns)
    best = sweep.best_first()[0]

    history = figure.add_subplot(places[0, :])
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    so_far = accumulate((trial.values[0] for trial in complete), min if sweep.metric == "loss" else max)
    history.plot(
        [trial.number for trial in complete],
        list(so_far),
        color=_COLORS["best"],
        label="best so far",
        drawstyle="steps-post",
    )
    _scatter(history, trials, [trial.number for trial in trials], best)
    history.set(xlabel="trial", ylabel=sweep.metric)
    history.legend()

    for number, axis in enumerate(sweep.axes):
        panel = figure.add_subplot(places[1 + number // columns, number % columns], sharey=history)
        _scatter(panel, trials, _positions(panel, axis, trials), best)
        panel.set(xlabel=axis.name, ylabel=sweep.metric)
    return figure


def _positions(panel: Axes, axis: Axis, trials: Sequence[FrozenTrial]) -> list[Any]:
    """Labels the horizontal axis of a panel, and returns where the trials stand on it."""
    values = [trial.params[axis.name] for trial in trials]
    if axis.choices:
        panel.set_xticks(range(len(axis.choices)), axis.choices)
        panel.set_xlim(-0.5, len(axis.choices) - 0.5)
        return [axis.choices.index(value) for value in values]
    panel.set_xscale("log" if axis.log else "linear")
    panel.set_xlim(axis.low, axis.high)
    return values


def _scatter(panel: Axes, trials: Sequence[FrozenTrial], positions: Sequence[Any], best: FrozenTrial) -> None:
    for layer, (group, color) in enumerate(_COLORS.items(), start=3):
        points = [
            (position, trial.value)
            for trial, position in zip(trials, positions, strict=True)
            if group == ("best" if trial.number == best.number else ended_as(trial))
        ]
        if points:
            panel.scatter(*zip(*points, strict=True), color=color, label=group, zorder=layer, clip_on=False)
