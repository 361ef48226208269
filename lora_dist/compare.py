"""Compares two runs, or two files of predictions, on the same images: `python -m lora_dist.compare FIRST SECOND`."""

import argparse

from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.settings.cli import argv_or


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Prints the disagreements, the metrics and a paired test.

    Raises:
        UserError: a file cannot be read, or the two have no image in common.
    """
    parser = argparse.ArgumentParser(
        prog="lora_dist.compare",
        description="Compare two models on the same images: which ones they classify differently, and whether the "
        "difference of their accuracies, or of the F1 of several labels, may be chance.",
    )
    what = "Directory of a run, or a file of predictions (JSONL, CSV or parquet)."
    parser.add_argument("first", metavar="FIRST", help=what)
    parser.add_argument("second", metavar="SECOND", help=what)
    arguments = parser.parse_args(argv_or(argv))
    from lora_dist.metrics.predictions import folder_label_by_predictions, read_predictions
    from lora_dist.metrics.report import comparison_lines, paired

    first, second = read_predictions(arguments.first), read_predictions(arguments.second)
    pair = paired(first, second)
    label_of = folder_label_by_predictions(pair.first, pair.second)
    for line in comparison_lines(pair, (arguments.first, arguments.second), label_of):
        print(line)


if __name__ == "__main__":
    run_command(main)
