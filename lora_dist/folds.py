"""Gathers the runs of all folds: `python -m lora_dist.folds runs/flowers/fold-*`.

Prints a table of their metrics, and writes the predictions for all images, each by the run that did not train on it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_dist.errors import UserError
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.settings.cli import argv_or, note_repeats
from lora_dist.settings.fields import fold_and_count
from lora_dist.storage.atomic import replace_file
from lora_dist.storage.writable import require_writable, writing

if TYPE_CHECKING:
    from lora_dist.metrics.predictions import Predictions

logger = logging.getLogger("lora_dist.folds")

OUT_OF_FOLD = "out_of_fold.jsonl"
_MAY_DIFFER = {"fold", "output_dir", "resume_from_checkpoint", "hub_model_id", "pixel_range"}
_METRIC = "eval_"


class Run(NamedTuple):
    """The run of a fold: its directory, settings, results and out-of-fold predictions; folds count from 1."""

    directory: Path
    fold: int
    folds: int
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    predictions: Predictions


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes the predictions.

    Raises:
        UserError: a run is not finished, was trained without --fold, or does not belong to the others.
    """
    parser = argparse.ArgumentParser(prog="lora_dist.folds", description="Gather the runs of the folds of --fold.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="Directory of the run of a fold.")
    default = f"Default: {OUT_OF_FOLD} beside the runs."
    parser.add_argument(
        "--output", action="append", type=Path, default=[], help=f"File for the out-of-fold predictions. {default}"
    )
    arguments = parser.parse_args(argv_or(argv))
    note_repeats("output", arguments.output)
    output = arguments.output[-1] if arguments.output else arguments.runs[0].resolve().parent / OUT_OF_FOLD
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    require_writable(output.parent, "--output")
    gather(arguments.runs, output)


def gather(directories: Sequence[Path], output: Path) -> None:
    """Checks that the runs belong together, prints the table, and writes the predictions to `output`."""
    from lora_dist.metrics.predictions import predictions_file, read_predictions
    from lora_dist.metrics.report import metric_lines

    runs = sorted((read_run(directory) for directory in directories), key=lambda run: run.fold)
    require_together(runs)
    for line in table(runs):
        print(line)
    content = b"".join(predictions_file(run.directory).read_bytes() for run in runs)
    with writing(output, "output"):
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, content)
    print("\nout of fold, " + "\n".join(metric_lines(read_predictions(output))))
    print(f"wrote {output}")


def read_run(directory: Path) -> Run:
    """Reads a finished run of a fold.

    Raises:
        UserError: the directory has no such run.
    """
    import json

    import yaml

    from lora_dist.metrics.predictions import read_predictions

    try:
        settings = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        results = json.loads((directory / "all_results.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{directory}: not the directory of a finished run ({error.filename}: {error.strerror})"
        ) from error
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{directory}: its config.yaml or all_results.json cannot be read ({error})") from error
    if not isinstance(settings, Mapping) or not settings.get("fold"):
        raise UserError(f"{directory}: the run has no --fold")
    predictions = read_predictions(directory)
    if predictions.probabilities is None:
        raise UserError(f"{directory}: its predictions have no probabilities; resume the run to write them again")
    return Run(directory, *fold_and_count(settings["fold"]), settings, results, predictions)


def require_together(runs: Sequence[Run]) -> None:
    """Warns of missing folds and of settings that differ.

    Raises:
        UserError: the runs are not of different folds of the same images, cut in the same way, with the same classes.
    """
    first = runs[0]
    seen: dict[str, Run] = {}
    for run in runs:
        for name, one, other in (
            ("folds", first.folds, run.folds),
            ("seed", first.settings.get("seed"), run.settings.get("seed")),
        ):
            if one != other:
                raise UserError(f"{first.directory} has {name} {one} and {run.directory} {other}: not the same folds")
        for path in run.predictions.paths:
            if path in seen:
                raise UserError(
                    f"{path} is a validation image of both {seen[path].directory} and {run.directory}: they are runs "
                    f"of the same fold, or of data that changed in between"
                )
            seen[path] = run
        if differing := _differing(first.settings, run.settings):
            flags = ", ".join(f"--{name}" for name in differing)
            logger.warning("%s and %s differ in %s", first.directory, run.directory, flags)
        if run.predictions.multi_label != first.predictions.multi_label:
            raise UserError(f"{first.directory} and {run.directory} have different problem types")
        if run.predictions.classes != first.predictions.classes:
            raise UserError(f"{first.directory} and {run.directory} have different classes")
    if missing := sorted(set(range(1, first.folds + 1)) - {run.fold for run in runs}):
        named = ", ".join(f"{fold}/{first.folds}" for fold in missing)
        logger.warning("folds without a run: %s. The table and the predictions are those of the others", named)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    names = sorted((one.keys() | other.keys()) - _MAY_DIFFER)
    return [name for name in names if one.get(name) != other.get(name)]


def table(runs: Sequence[Run]) -> Iterator[str]:
    """Yields a Markdown table with a column for each metric: its mean and standard deviation, and that of each fold."""
    from statistics import mean, stdev

    names = [
        name
        for name in runs[0].results
        if name.startswith(_METRIC) and any(isinstance(run.results.get(name), float) for run in runs)
    ]
    yield f"| | {' | '.join(name.removeprefix(_METRIC) for name in names)} |"
    yield "|---|" + "---|" * len(names)
    for title, statistic, fewest in (("mean", mean, 1), ("deviation", stdev, 2)):
        # A loss that is not finite is null.
        values: Iterator[list[Any]] = ([run.results.get(name) for run in runs] for name in names)
        numbers = (None if None in some or len(some) < fewest else statistic(some) for some in values)
        yield f"| {title} | {' | '.join(map(_cell, numbers))} |"
    for run in runs:
        yield f"| fold {run.fold} | {' | '.join(_cell(run.results.get(name)) for name in names)} |"


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


if __name__ == "__main__":
    run_command(main)
