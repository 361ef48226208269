"""What each setting does to the accuracy of the demo: one factor changed at a time, several seeds each.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/recipes_on_digits.py --seeds 1 2 3 --jobs 2
    PYTHONPATH=. python tests/benchmarks/recipes_on_digits.py --seeds      # prints the table of what is there

Trains the base model of the demo on its 1,442 digits and evaluates on the 355 others. Each finished run adds a row to
`results/recipes_on_digits.csv`; a run that has a row is skipped, so that the command can be stopped and repeated. A
row's accuracy is that of the best evaluation, as in a run's `all_results.json`; `last` is that of the last one. The
table goes to `results/recipes_on_digits.md`: mean, 95% interval (Student's t over seeds), and the mean difference to
the first variant on the same seeds. Its seconds are those of the fastest run, which other work slowed least.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

from result_files import RESULTS, add_rows

ROWS = "recipes_on_digits.csv"
TABLE = RESULTS / "recipes_on_digits.md"
FIRST = {
    "model_name_or_path": "demo:vit",
    "train_dir": "demo:digits/train",
    "validation_dir": "demo:digits/validation",
    "augmentation": "none",
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 8,
    "learning_rate": 8e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
}
"""The settings that each variant changes: the first recipe of the demo."""
CROPS = {"augmentation": "basic", "horizontal_flip": 0, "crop_scale_min": 0.8}
VARIANTS: dict[str, dict[str, object]] = {
    "LoRA": {},
    "--ema_decay 0.98": {"ema_decay": 0.98},
    "--head_learning_rate 2.4e-3": {"head_learning_rate": 2.4e-3},
    "--label_smoothing_factor 0.1": {"label_smoothing_factor": 0.1},
    "--layer_decay 0.8": {"layer_decay": 0.8},
    "--min_lr 8e-4": {"min_lr": 8e-4},
    "--loraplus_lr_ratio 4": {"loraplus_lr_ratio": 4},
    "random crops of 80% and more": CROPS,
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "--train_norms true --lora_bias all": {"train_norms": True, "lora_bias": "all"},
    "--lora_target_modules all-linear": {"lora_target_modules": "all-linear"},
    "head": {"tuning": "head"},
    "full, learning rate 1e-3": {"tuning": "full", "learning_rate": 1e-3},
}
"""What each variant changes, by its name in the table."""
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
"""The 97.5% quantile by degrees of freedom; 2.2 beyond."""


def train(arguments: list[str], log: str) -> None:
    """Trains in a process of its own, whose output goes to a file."""
    from lora_dist.processes.lifetime import run_command
    from lora_dist.train import main as command

    with Path(log).open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    run_command(lambda: command(arguments))


def run(variant: str, seed: int, folder: Path) -> dict[str, object]:
    """Returns the row of a finished run.

    Raises:
        RuntimeError: the run failed; the message ends with its output.
    """
    output = folder / f"{list(VARIANTS).index(variant)}-{seed}"
    settings = FIRST | VARIANTS[variant] | {"seed": seed, "output_dir": output}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    log = f"{output}.log"
    process = multiprocessing.get_context("forkserver").Process(target=train, args=(arguments, log))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{variant}, seed {seed}:\n{Path(log).read_text(encoding='utf-8')[-4000:]}")
    results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line["eval/accuracy"] for line in metrics if "eval/accuracy" in line][-1]
    return {
        "variant": variant,
        "changes": changes(variant),
        "seed": seed,
        "accuracy": round(results["eval_accuracy"], 4),
        "loss": round(results["eval_loss"], 4),
        "last": round(last, 4),
        "seconds": round(results["train_runtime"], 1),
    }


def changes(variant: str) -> str:
    """The settings that a variant changes, as text; a row belongs to a variant only if they are the same."""
    return " ".join(f"{name}={value}" for name, value in VARIANTS[variant].items())


def finished() -> dict[tuple[str, int], dict[str, str]]:
    """The rows that are there, by changes and seed."""
    path = RESULTS / ROWS
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {(row["changes"], int(row["seed"])): row for row in csv.DictReader(file)}


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of the 95% interval, in percent."""
    if len(values) < 2:
        return f"{mean(values):.2%}"
    half = STUDENT_T.get(len(values) - 1, 2.2) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):.2%} ± {100 * half:.2f}"


def table() -> str:
    """The table of all rows that are there."""
    rows = finished()
    seeds = {name: {seed: row for (what, seed), row in rows.items() if what == changes(name)} for name in VARIANTS}
    first = next(iter(seeds.values()))
    lines = [
        "| variant | seeds | accuracy | loss | difference on the same seeds | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in seeds.items():
        if not found:
            continue
        accuracies = [float(row["accuracy"]) for row in found.values()]
        losses = mean(float(row["loss"]) for row in found.values())
        pairs = [
            float(row["accuracy"]) - float(first[seed]["accuracy"]) for seed, row in found.items() if seed in first
        ]
        difference = "" if found is first or not pairs else interval(pairs).replace("%", "", 1)
        cells = [f"`{name}`" if name.startswith("--") else name, str(len(found)), interval(accuracies), f"{losses:.3f}"]
        seconds = min(float(row["seconds"]) for row in found.values())
        lines.append(f"| {' | '.join(cells)} | {difference} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(1, 11)))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    arguments = parser.parse_args()
    rows = finished()
    missing = [
        (name, seed) for seed in arguments.seeds for name in arguments.variants if (changes(name), seed) not in rows
    ]
    # The modules are imported once; each run then is a fork of that process.
    multiprocessing.set_forkserver_preload(["lora_dist.training.assembly", "lora_dist.training.loop"])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        for done in as_completed([pool.submit(run, name, seed, Path(folder)) for name, seed in missing]):
            add_rows(ROWS, [done.result()])
            print(done.result(), flush=True)
    TABLE.write_text(table(), encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
