"""Curves that go on where a killed run left them, and nothing at all from the processes that do not write."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_dist_testing.disks import fill, small_disk
from lora_dist_testing.terminals import terminal
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import backend_context
from tensorboard.summary.writer import event_file_writer

from lora_dist.training.reporting.curve_files import JsonLines
from lora_dist.training.reporting.throughput import peak_memory_mb
from lora_dist.training.reporting.tracking import Tracker


@pytest.fixture(autouse=True)
def _counter_of_event_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of one second are ordered by a counter, as text: the file with 10 would come before that with 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def tracker(root: Path, first_step: int = 0, enabled: bool = True) -> Tracker:
    return Tracker(root, enabled=enabled, first_step=first_step, total_steps=10)


def board(root: Path) -> EventAccumulator:
    reader = EventAccumulator(str(root / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    reader.Reload()
    return reader


def lines(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def log(one: Tracker, *steps: int, loss: float = 0.5) -> None:
    for step in steps:
        one.scalars(step, step / 4, {"train/loss": loss * step, "train/learning_rate": 1e-3})


def test_numbers_go_to_the_curves_and_to_the_lines(tmp_path: Path) -> None:
    one = tracker(tmp_path)
    log(one, 1, 2, 3)
    one.close()
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("train/loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
    ]
    assert lines(tmp_path)[1] == {"step": 2, "epoch": 0.5, "train/loss": 1.0, "train/learning_rate": 1e-3}


def test_what_an_interrupted_run_logged_beyond_its_checkpoint_is_replaced(tmp_path: Path) -> None:
    """It dies after step 5 and in the middle of a line, and goes on from the checkpoint of step 3."""
    one = tracker(tmp_path)
    log(one, 1, 2, 3, 4, 5)
    one.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')
    one = tracker(tmp_path, first_step=3)
    log(one, 4, 5, 6, loss=2.0)
    one.close()
    expected = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 8.0), (5, 10.0), (6, 12.0)]
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == expected
    assert [(event.step, event.value) for event in board(tmp_path).Scalars("train/loss")] == expected


def test_bytes_that_are_no_text_among_the_lines_are_dropped(tmp_path: Path) -> None:
    log(tracker(tmp_path), 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00\n[7]\n")
    log(tracker(tmp_path, first_step=1), 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.root
def test_lines_stay_where_there_is_no_room_to_drop_some(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        log(tracker(disk), 1, 2)
        before = (disk / "metrics.jsonl").read_bytes()
        fill(disk)
        JsonLines(disk / "metrics.jsonl", 1)
        assert (disk / "metrics.jsonl").read_bytes() == before
    assert "No space left on device" in caplog.text


def test_a_file_where_the_curves_belong_costs_them_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file", encoding="utf-8")
    one = tracker(tmp_path)
    log(one, 1)
    one.close()
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert "TensorBoard" in caplog.text


def test_a_run_from_scratch_keeps_nothing_of_the_last_one(tmp_path: Path) -> None:
    one = tracker(tmp_path)
    log(one, 1, 2)
    one.close()
    one = tracker(tmp_path)
    log(one, 1, loss=3.0)
    one.close()
    assert [line["train/loss"] for line in lines(tmp_path)] == [3.0]


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tracker(tmp_path, enabled=False)
    log(one, 1)
    one.advance(1, 0.5, 10)
    one.say("hello")
    one.progress_line(1, 0.1, {"train/loss": 1.0}, 3)
    one.picture("x", Image.new("RGB", (4, 4)), 1)
    one.settings({"seed": 1})
    one.hyperparameters({"seed": 1}, {"accuracy": 1.0})
    one.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_pictures_settings_and_the_comparison_of_runs_are_on_the_board(tmp_path: Path) -> None:
    """Settings include lists and None, which TensorBoard's own hyperparameters refuse."""
    one = tracker(tmp_path)
    one.picture("eval/worst", Image.fromarray(np.full((5, 7, 3), 9, dtype=np.uint8)), 3)
    flat = {"learning_rate": 5e-3, "lora_target_modules": ["query", "value"], "max_train_steps": None, "use_dora": True}
    one.settings(flat)
    one.hyperparameters(flat, {"accuracy": 0.75})
    one.close()
    reader = board(tmp_path)
    picture = reader.Images("eval/worst")[0]
    assert (picture.step, picture.width, picture.height) == (3, 7, 5)
    text = reader.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "- query" in text
    assert reader.Scalars("hparam/accuracy")[0].value == 0.75
    assert len(list((tmp_path / "tensorboard").rglob("events*"))) == len(list((tmp_path / "tensorboard").iterdir()))


def test_the_comparison_of_runs_begins_with_the_settings_that_people_compare(tmp_path: Path) -> None:
    """As TensorBoard's own server orders them."""
    one = tracker(tmp_path)
    names = ("adam_beta1", "adam_epsilon", "tuning", "learning_rate", "lora_r", "seed", "num_train_epochs")
    one.hyperparameters(dict.fromkeys(names, 1), {"accuracy": 0.75})
    one.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    backend = backend_context.Context(TBContext(data_provider=provider))
    experiment = backend.experiment_from_metadata(
        RequestContext(), "", True, backend.hparams_metadata(RequestContext(), ""), []
    )
    shown = [info.name for info in experiment.hparam_infos]
    assert shown == ["learning_rate", "lora_r", "num_train_epochs", "tuning", "adam_beta1", "adam_epsilon", "seed"]


def test_memory_is_that_of_this_process() -> None:
    """Importing torch alone takes more than 50 MB, and no test of this project takes 100 GB."""
    assert 50 < peak_memory_mb(torch.device("cpu")) < 100_000


def test_a_message_after_a_flush_has_a_line_of_its_own_at_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving says something while the progress bar stands."""
    with terminal() as (stderr, shown):
        monkeypatch.setattr(sys, "stderr", stderr)
        one = tracker(tmp_path)
        for step in (1, 2):
            time.sleep(0.11)  # the bar is drawn ten times a second
            one.advance(step, 0.5, 10)
        one.flush()
        print("saved", file=stderr)
        before = shown("saved").partition("saved")[0]
        one.close()
    assert "step 2/10" in before
    *_, erased, line = before.split("\r")
    assert (erased.strip(), line) == ("", "")


def test_a_message_before_the_first_update_shows_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty bar would share its line with the next log, such as that of the features after --probe."""
    with terminal() as (stderr, shown):
        monkeypatch.setattr(sys, "stderr", stderr)
        one = tracker(tmp_path)
        one.say("before training")
        one.close()
        print("the end", file=stderr)
        assert "step 0/10" not in shown("the end")


def test_a_run_without_updates_left_shows_no_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was killed in its last evaluation, and resumes."""
    with terminal() as (stderr, shown):
        monkeypatch.setattr(sys, "stderr", stderr)
        one = tracker(tmp_path, first_step=10)
        one.say("evaluated")
        one.close()
        print("the end", file=stderr)
        assert shown("the end").splitlines() == ["the end"]
