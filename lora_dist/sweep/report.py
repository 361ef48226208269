"""Reports a sweep: prints a table, and writes trials.csv, a picture and the best settings for `--config`."""

import csv
import io
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import wrap

import yaml
from optuna.trial import FrozenTrial

from lora_dist.settings.sweep import given_settings, value_of, with_alpha, with_values
from lora_dist.storage.atomic import replace_file
from lora_dist.sweep.plot import plot_sweep
from lora_dist.sweep.study import REASON, SECONDS, Sweep, ended_as
from lora_dist.sweep.trials import shown

BEST = "best.yaml"
MOST_ROWS = 20
NAME_WIDTH = 10
"""Characters of a name in a line of the header."""
MOST_REASON = 160
"""Characters of a reason in the terminal; trials.csv has all of it."""


def report(sweep: Sweep) -> bool:
    """Writes the files and prints the table; returns whether any trial is complete."""
    root, complete = sweep.root, sweep.best_first()
    pruned, failed = ([one for one in sweep.ended() if ended_as(one) == word] for word in ("pruned", "failed"))
    trials = [*complete, *pruned, *failed]
    names = [axis.name for axis in sweep.axes]
    _write_csv(sweep, names, trials)
    rows = [[*_result(trial), *(shown(trial.params.get(name, "")) for name in names)] for trial in trials[:MOST_ROWS]]
    for line in table(["trial", sweep.metric, "ended", *names], rows, shutil.get_terminal_size().columns):
        print(line)
    if len(trials) > MOST_ROWS:
        print(f"… and {len(trials) - MOST_ROWS} more in trials.csv")
    for trial in failed[:MOST_ROWS]:
        print(f"trial {trial.number} failed: {trial.user_attrs[REASON][:MOST_REASON]}")
    if not complete:
        return False
    picture = io.BytesIO()
    plot_sweep(sweep).savefig(picture, format="png")
    replace_file(root / "sweep.png", picture.getvalue())
    _write_best(sweep, complete[0])
    print(f"best: trial {complete[0].number}, in {sweep.output_of(complete[0].number)}")
    print(f"wrote trials.csv, sweep.png and best.yaml to {root}; to train with the best settings:")
    print(f"  {_command(root / BEST)}")
    return True


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yields the lines of a table. One wider than `width` is split into blocks, each of which repeats three columns.

    Args:
        header: names; long ones go on in a further line after an underscore.
        rows: cells as text.
        width: of the terminal, in characters.
    """
    names = [[line.replace(" ", "") for line in wrap(name.replace("_", "_ "), NAME_WIDTH)] for name in header]
    height = max(map(len, names))
    lists = [
        [*[""] * (height - len(name)), *name, *cells]
        for name, cells in zip(names, zip(*rows, strict=True), strict=True)
    ]
    columns = [[cell.rjust(max(map(len, cells))) for cell in cells] for cells in lists]
    for block in _blocks(columns, width):
        yield from ("  ".join(line).rstrip() for line in zip(*block, strict=True))
        yield ""


def _blocks(columns: Sequence[Sequence[str]], width: int) -> Iterator[Sequence[Sequence[str]]]:
    block = [*columns[:3]]
    for column in columns[3:]:
        if len(block) > 3 and sum(len(one[0]) + 2 for one in (*block, column)) - 2 > width:
            yield block
            block = [*columns[:3]]
        block.append(column)
    yield block


def _result(trial: FrozenTrial) -> tuple[str, str, str]:
    return str(trial.number), "" if trial.value is None else f"{trial.value:.4f}", ended_as(trial)


def _write_csv(sweep: Sweep, names: Sequence[str], trials: Sequence[FrozenTrial]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["trial", sweep.metric, "ended", *names, "evaluations", SECONDS, REASON])
    for trial in trials:
        number, _, how = _result(trial)
        values = (trial.params.get(name) for name in names)
        attributes = (trial.user_attrs.get(name) for name in (SECONDS, REASON))
        writer.writerow([number, trial.value, how, *values, len(trial.intermediate_values), *attributes])
    replace_file(sweep.root / "trials.csv", file.getvalue().encode())


def _write_best(sweep: Sweep, best: FrozenTrial) -> None:
    values = with_alpha(sweep.settings, best.params)
    trained = with_values(sweep.settings, values)
    content = given_settings(sweep.settings) | {name: value_of(trained, name) for name in values}
    lines = (
        f"# Trial {best.number}, the best of {len(sweep.ended())}: {sweep.metric} {best.value:.4f} in validation.",
        f"# {_command(sweep.root / BEST)}",
        yaml.safe_dump(content, sort_keys=False, allow_unicode=True),
    )
    replace_file(sweep.root / BEST, "\n".join(lines).encode())


def _command(best: Path) -> str:
    words = ("--config", str(best), "--output_dir", str(best.with_suffix("")))
    return f"accelerate launch -m lora_dist.train {shlex.join(words)}"
