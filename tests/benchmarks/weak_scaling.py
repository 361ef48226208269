"""Weak scaling to many GPUs, predicted from the bytes that engine_costs.py measured on two: a table of Markdown.

    python tests/benchmarks/weak_scaling.py vit_b

Nothing of it was run. An update is computing and then sending, one after the other; where an engine overlaps them it
does better. Bytes are those of `results/engine_costs.csv`, in fp32, which grow with P processes as (P - 1) / P. Each
GPU has the whole of the stated bandwidth. Every collective adds the latency of a tree over all GPUs, there and back.
Stragglers, loading and congestion are left out.
"""

import csv
import math
import sys
from pathlib import Path
from typing import NamedTuple

MEASURED = Path(__file__).parent / "results" / "engine_costs.csv"
GPUS = (8, 64, 512, 4096)
GIGABITS = (25, 100, 400)
HOP_SECONDS = 10e-6


class Model(NamedTuple):
    """What the prediction takes for granted.

    Attributes:
        weights_mb: of all weights in fp32.
        trained_mb: of those that train.
        layers: whose weights ZeRO-3 fetches one after the other.
        compute_seconds: of an update: 64 images of 224 x 224 a GPU, 70 (246) GFLOP an image for forward and backward,
            at 400 TFLOP/s.
    """

    weights_mb: float
    trained_mb: float
    layers: int
    compute_seconds: float


MODELS = {"vit_b": Model(346.2, 2.67, 12, 0.0112), "vit_l": Model(1219.1, 6.72, 24, 0.0394)}
ENGINES = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def measured_mb(path: Path, model: str) -> dict[str, float]:
    """Engine to what a process sent in an update, on two processes."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["engine"]: float(row["sent_mb_an_update_a_process"])
            for row in csv.DictReader(file)
            if row["model"] == model and row["engine"] in ENGINES
        }


def formula_mb(engine: str, model: Model, processes: int) -> float:
    """What a process sends in an update by the formulas in docs/benchmarks.md; for ZeRO-3 the upper bound."""
    factor = {"ddp": 2 * model.trained_mb, "zero3": 2 * model.weights_mb}.get(engine, 3 * model.trained_mb)
    return factor * (processes - 1) / processes


def efficiency(engine: str, model: Model, measured: float, gpus: int, gigabits: float) -> float:
    """Predicted share of an update that is computing.

    Args:
        engine: of `ENGINES`.
        model: of `MODELS`.
        measured: MB that a process sent on two processes.
        gpus: number of processes.
        gigabits: a second, of each GPU.
    """
    sent = measured * 2 * (gpus - 1) / gpus
    # The loss, then gradients, and for ZeRO the weights that come of them; ZeRO-3 fetches each layer twice.
    collectives = {"ddp": 2, "zero3": 2 * model.layers + 2}.get(engine, 3)
    sending = sent * 8e-3 / gigabits + collectives * 2 * math.log2(gpus) * HOP_SECONDS
    return model.compute_seconds / (model.compute_seconds + sending)


def table(name: str) -> str:
    """The predictions for a model as Markdown."""
    model = MODELS[name]
    lines = [
        f"| at {', '.join(map(str, GIGABITS))} Gb/s | sent on two processes | the formula says |"
        + "".join(f" {gpus:,} GPUs |" for gpus in GPUS),
        "|---" * (3 + len(GPUS)) + "|",
    ]
    for engine, measured in measured_mb(MEASURED, name).items():
        shares = (
            ", ".join(f"{efficiency(engine, model, measured, gpus, gigabits):.0%}" for gigabits in GIGABITS)
            for gpus in GPUS
        )
        cells = (ENGINES[engine], f"{measured:.1f} MB", f"{formula_mb(engine, model, 2):.1f} MB", *shares)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
