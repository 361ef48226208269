"""Other trackers than TensorBoard (`--report_to`): what W&B gets, what a missing or a failing one does to a run."""

import json
import logging
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from lora_dist_testing.launching import results_of, run, run_flags
from PIL import Image

from lora_dist.errors import UserError
from lora_dist.training.reporting.external_trackers import ExternalTrackers, require_trackers


def _records(path: Path) -> Iterator[bytes]:
    """The records of an offline run: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        whole += data[position - length : position]
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


class Recorder(GeneralTracker):
    """Keeps what it gets; fails from the second log on."""

    name = "trackio"
    requires_logging_directory = False
    main_process_only = False

    def __init__(self, project: str, **options: Any) -> None:
        super().__init__()
        self.given: list[Any] = [(project, options)]

    def start(self) -> None:
        self.name = self.given[0][1]["name"]
        if self.name.startswith("refused"):
            raise RuntimeError("not logged in")

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.given.append(values)

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if len(self.given) > 2:
            raise ConnectionError("no network")
        self.given.append((step, values))


@pytest.fixture(autouse=True)
def _state() -> None:
    PartialState(cpu=True)


@pytest.mark.timeout(300)
def test_wandb_gets_the_curves_pictures_and_settings_and_a_resumed_run_goes_on(
    vit: Path, photos: Path, tmp_path: Path
) -> None:
    """Offline, read back from the file that `wandb sync` sends."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    out = tmp_path / "run"
    for steps in (2, 3):
        flags = run_flags(
            vit, photos, out, report_to="wandb", logging_steps=1, max_train_steps=steps, resume_from_checkpoint="auto"
        )
        run("lora_dist.train", *flags, WANDB_MODE="offline", WANDB_SILENT="true")
    runs = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    ids, values, config = set(), {}, {}
    for path in runs:
        for record in map(Record.FromString, _records(path)):
            if record.HasField("run"):
                ids.add(record.run.run_id)
                config |= {item.key: item.value_json for item in record.run.config.update}
            config |= {item.key: item.value_json for item in record.config.update}
            logged = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if "train/loss" in logged:
                values[int(logged["_step"])] = float(logged["train/loss"])
    assert len(runs) == 2
    assert ids == set(json.loads((out / "tracker_runs.json").read_text()).values())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert values == pytest.approx({line["step"]: line["train/loss"] for line in lines if "train/loss" in line})
    assert sorted(values) == [1, 2, 3]
    assert json.loads(config["lora_r"]) == 16
    assert any(path.suffix == ".png" for path in out.glob("wandb/*/files/media/images/**/*"))
    assert results_of(out)["step"] == 3


def test_a_tracker_that_fails_is_logged_once_and_not_called_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    trackers = ExternalTrackers(["tensorboard", "trackio"], tmp_path / "mine", False, {"lora_r": 4})
    recorder = trackers._trackers["trackio"]
    with caplog.at_level(logging.ERROR):
        trackers.scalars(1, {"train/loss": 0.5, "train/grad_norm": math.inf})
        trackers.scalars(2, {"train/loss": 0.4})
        trackers.scalars(3, {"train/loss": 0.3})
        trackers.picture("inputs", Image.new("RGB", (2, 2)), 3)
        trackers.close()
    assert isinstance(recorder, Recorder)
    assert recorder.given == [
        ("lora_dist", {"name": recorder.name, "resume": "allow"}),
        {"lora_r": 4},
        (1, {"train/loss": 0.5}),
    ]
    assert [record.message for record in caplog.records] == [
        "trackio failed and gets nothing more from this run: no network"
    ]


def test_runs_in_directories_of_one_name_stay_apart_in_trackio_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trackio finds a run by its name alone, and forgets the settings of a run that is resumed without any."""
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)

    def name_of(output_dir: Path, resumes: bool) -> str:
        recorder = ExternalTrackers(["trackio"], output_dir, resumes, {"lora_r": 4})._trackers["trackio"]
        assert isinstance(recorder, Recorder)
        assert recorder.given[1:] == [{"lora_r": 4}]
        return recorder.name

    first, other = (name_of(tmp_path / sweep / "trial-0000", resumes=False) for sweep in ("first", "other"))
    assert first != other
    assert first.startswith("trial-0000-")
    assert name_of(tmp_path / "first" / "trial-0000", resumes=True) == first


def test_a_tracker_that_does_not_start_or_is_not_installed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    with pytest.raises(UserError, match="--report_to trackio: cannot start it: not logged in"):
        ExternalTrackers(["trackio"], tmp_path / "refused", False, {})
    with pytest.raises(UserError, match=r"--report_to comet_ml,aim: not installed; pip install comet-ml aim"):
        require_trackers(["tensorboard", "comet_ml", "aim"])
