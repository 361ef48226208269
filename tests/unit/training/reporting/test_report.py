"""The metrics of a run as lines of its log."""

from types import SimpleNamespace
from typing import Any

from lora_dist.training.reporting.report import headline_lines, slice_lines

INTERVAL = (0.3784, 0.9889)
NAMES = ("mAP", "micro_f1", "macro_f1")


def test_lines_of_metrics_have_at_most_a_hundred_characters() -> None:
    evaluation: Any = SimpleNamespace(
        metrics={"loss": 0.5, **dict.fromkeys(NAMES, 0.4321)}, intervals=dict.fromkeys(NAMES, INTERVAL)
    )
    lines = headline_lines(evaluation)
    assert len(lines) == 2
    assert lines[1] == "macro F1 0.4321 (95% interval 0.3784 to 0.9889)"
    row = {**dict.fromkeys(NAMES, 0.4321), "mAP_interval": INTERVAL, "num_samples": 1234, "is_small": False}
    few = {**row, "mAP": 0.1, "num_samples": 9, "is_small": True}
    told = list(slice_lines({"site": {"north": row, "south": few}}))
    assert [line for line in told if not line.startswith(" ")] == [
        "site south: 9 images, fewer than 30",
        "site north: 1,234 images",
    ]
    assert told[1] == "  mAP 0.1000 (95% interval 0.3784 to 0.9889), micro F1 0.4321"
    assert max(map(len, [*lines, *told])) <= 100
