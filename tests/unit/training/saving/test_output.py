"""The directory of a run: none is overwritten, an interrupted one is found again, and a changed setting is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lora_dist_testing.disks import fill, small_disk
from lora_dist_testing.launching import RESULTS
from lora_dist_testing.tiny import perturb
from peft import PeftModel

from lora_dist.errors import UserError
from lora_dist.model.base.backbone import load_base
from lora_dist.model.lora.trainable import make_trainable
from lora_dist.processes.runtime import launch
from lora_dist.settings.cli import flatten
from lora_dist.settings.train import LoraSettings, ModelSettings, Settings
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.output import Output, find_resume

SPLITS: dict[str, Any] = {"train": {"num_samples": 2, "rows": [0, 1]}, "validation": {"num_samples": 1, "rows": [2]}}


def model(vit: Path, **lora: Any) -> Any:
    return make_trainable(load_base(str(vit), ["a", "b"]), ModelSettings(), LoraSettings(lora_r=4, **lora))


def write(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.write(root / "checkpoints", step, checkpoint.Checkpoint({}, {}, {"step": step}))


@pytest.mark.parametrize("there", [False, True])
def test_a_new_or_empty_directory_is_a_start(there: bool, tmp_path: Path) -> None:
    root = tmp_path / "run"
    if there:
        root.mkdir()
    assert find_resume(Output(root), None) is None
    assert find_resume(Output(root), "auto") is None


@pytest.mark.parametrize("kind", ["directory in use", "file"])
def test_a_directory_in_use_is_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    if kind == "file":
        root.write_text("x")
    else:
        write(root, 3)
    with pytest.raises(UserError, match=r"run is not empty.*--resume_from_checkpoint auto"):
        find_resume(Output(root), None)


def test_auto_finds_the_newest_checkpoint_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 3, 20, 100)
    (checkpoint.path_of(tmp_path / "checkpoints", 100) / checkpoint.COMPLETE).unlink()
    launch("no")
    found = find_resume(Output(tmp_path), "auto")
    assert found is not None
    assert found.state == {"step": 20}
    said = capsys.readouterr().err
    assert "step-00000100" in said
    assert f"resuming from {checkpoint.path_of(tmp_path / 'checkpoints', 20)}" in said


def test_a_checkpoint_may_be_named_and_has_to_be_whole(tmp_path: Path) -> None:
    write(tmp_path / "old", 3, 5)
    path = checkpoint.path_of(tmp_path / "old" / "checkpoints", 3)
    found = find_resume(Output(tmp_path / "new"), str(path))
    assert found is not None
    assert found.state == {"step": 3}
    (path / checkpoint.STATE).write_text("{}")
    with pytest.raises(UserError, match="cannot resume from"):
        find_resume(Output(tmp_path / "new"), str(path))


@pytest.mark.parametrize("spelling", ["absolute", "relative", "link"])
def test_a_checkpoint_of_the_directory_itself_may_be_named_however_it_is_spelled(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", 3, 5)
    path = checkpoint.path_of(tmp_path / "run" / "checkpoints", 3)
    if spelling == "link":
        (tmp_path / "link").symlink_to(tmp_path / "run")
        path = checkpoint.path_of(tmp_path / "link" / "checkpoints", 3)
    elif spelling == "relative":
        monkeypatch.chdir(tmp_path)
        path = path.relative_to(tmp_path)
    found = find_resume(Output(tmp_path / "run"), str(path))
    assert found is not None
    assert found.state == {"step": 3}


@pytest.mark.parametrize("into", ["other", "."])
def test_a_checkpoint_does_not_go_on_in_a_directory_of_others(into: str, tmp_path: Path) -> None:
    """Neither in that of another run, nor in one that holds several runs, its own among them."""
    write(tmp_path / "run", 3)
    write(tmp_path / "other", 5)
    path, root = checkpoint.path_of(tmp_path / "run" / "checkpoints", 3), tmp_path / into
    with pytest.raises(UserError) as caught:
        find_resume(Output(root), str(path))
    message = str(caught.value)
    assert f"{path} is not a checkpoint of the run in --output_dir {root}" in message
    assert "--resume_from_checkpoint auto" in message
    assert "an empty --output_dir" in message


@pytest.mark.parametrize("name", ["adapter", "model", "all_results.json", "evaluation.json"])
def test_auto_does_not_begin_from_scratch_over_results(name: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert find_resume(Output(tmp_path), "auto") is None
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{tmp_path} holds results \({name}\) but no complete checkpoint"):
        find_resume(Output(tmp_path), "auto")
    write(tmp_path, 3)
    assert find_resume(Output(tmp_path), "auto") is not None
    (checkpoint.path_of(tmp_path / "checkpoints", 3) / checkpoint.STATE).write_text("damaged")
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_resume(Output(tmp_path), "auto")


def _finish(output: Output, step: int, text: str) -> None:
    """Leaves what a run leaves at its end."""
    output.adapter.mkdir(parents=True, exist_ok=True)
    (output.adapter / "weights").write_text(text)
    output.results.write_text(json.dumps({"step": step, "text": text}))
    output.evaluation.write_text(text)
    (output.root / "metrics.jsonl").write_text(text)


def test_results_of_a_course_that_is_left_are_put_aside_and_never_overwritten(vit: Path, tmp_path: Path) -> None:
    output, one = Output(tmp_path), model(vit)
    for number, rate in enumerate((0.1, 0.2), 1):
        settings = flatten(Settings()) | {"learning_rate": rate}
        output.begin(settings, SPLITS, one, 4 if number > 1 else 0, False)
        _finish(output, 20, f"course {number}")
    output.begin(flatten(Settings()), SPLITS, one, 4, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "abandoned-results",
        "abandoned-results-2",
        "config.yaml",
        "metrics.jsonl",
        "split.json",
    ]
    for number, rate in enumerate((0.1, 0.2), 1):
        aside = tmp_path / ("abandoned-results" if number == 1 else "abandoned-results-2")
        assert {path.name for path in aside.iterdir()} == RESULTS - {"validation_predictions.jsonl"}
        for name in ("adapter/weights", "evaluation.json", "metrics.jsonl"):
            assert (aside / name).read_text() == f"course {number}"
        assert yaml.safe_load((aside / "config.yaml").read_text())["learning_rate"] == rate


@pytest.mark.parametrize("step", [20, 24])
def test_results_stay_where_the_run_goes_on_from_them(step: int, vit: Path, tmp_path: Path) -> None:
    output = Output(tmp_path)
    output.begin(flatten(Settings()), SPLITS, model(vit), 0, False)
    _finish(output, 20, "first")
    output.begin(flatten(Settings()), SPLITS, model(vit), step, False)
    assert (output.adapter / "weights").read_text() == "first"
    assert not list(tmp_path.glob("abandoned-*"))


@pytest.mark.parametrize(("step", "put_aside"), [(4, True), (20, False)])
def test_results_of_a_run_that_was_killed_while_it_wrote_them_go_by_its_checkpoints(
    step: int, put_aside: bool, vit: Path, tmp_path: Path
) -> None:
    output = Output(tmp_path)
    write(tmp_path, 4, 20)
    _finish(output, 20, "first")
    output.results.unlink()
    output.begin(flatten(Settings()), SPLITS, model(vit), step, False)
    assert (tmp_path / "abandoned-results" / "adapter" / "weights").exists() == put_aside
    assert (output.adapter / "weights").exists() != put_aside


@pytest.mark.root
def test_a_run_does_not_begin_where_results_cannot_be_put_aside(vit: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        output = Output(disk)
        _finish(output, 20, "first" * 3000)
        fill(disk)
        with pytest.raises(UserError, match=r"cannot move the results in .*disk: No space left on device"):
            output.begin(flatten(Settings()), SPLITS, model(vit), 4, False)
        assert (output.adapter / "weights").read_text() == "first" * 3000
        assert not list(disk.glob("abandoned-*"))


def test_a_run_writes_down_what_it_starts_from(vit: Path, tmp_path: Path) -> None:
    settings = flatten(Settings())
    Output(tmp_path / "run").begin(settings, SPLITS, model(vit), 0, False)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")) == {
        name: value for name, value in settings.items() if name != "resume_from_checkpoint"
    }
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == SPLITS
    assert not (tmp_path / "run" / "adapter_init").exists()


def test_a_setting_that_changed_since_the_run_began_is_told(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("no")
    settings = flatten(Settings())
    Output(tmp_path).begin(settings, SPLITS, model(vit), 0, False)
    changed = settings | {"learning_rate": 0.1, "lora_dropout": 0.5, "resume_from_checkpoint": "auto", "ema_decay": 0.9}
    Output(tmp_path).begin(changed, SPLITS, model(vit), 4, False)
    said = capsys.readouterr().err
    assert "--learning_rate was 0.005 when the run began and is now 0.1" in said
    assert "--lora_dropout was 0.1" in said
    assert "--ema_decay was not set when the run began and is now 0.9" in said
    assert "resume_from_checkpoint" not in said


def test_a_setting_that_changed_is_told_in_another_directory_as_well(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("no")
    first = flatten(Settings()) | {"output_dir": "first"}
    other = first | {"output_dir": "other", "learning_rate": 0.1}
    output = Output(tmp_path)
    assert output.begin(other, SPLITS, model(vit), 4, False, first)["learning_rate"] == 0.1
    said = capsys.readouterr().err
    assert "--learning_rate was 0.005 when the run began and is now 0.1" in said
    assert "--output_dir" not in said
    output.config.unlink()
    made_with = output.begin(other, SPLITS, model(vit), 20, True, first)
    assert (made_with["learning_rate"], made_with["output_dir"]) == (0.005, "other")


def test_a_finished_run_keeps_the_settings_that_it_was_made_with(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("no")
    output, settings = Output(tmp_path), flatten(Settings())
    first = output.begin(settings, SPLITS, model(vit), 0, False)
    written = output.config.read_bytes()
    assert output.begin(settings | {"learning_rate": 0.1}, SPLITS, model(vit), 20, True) == first
    assert "is now 0.1; ignored, because no update is left" in capsys.readouterr().err
    assert output.config.read_bytes() == written
    assert output.begin(settings | {"learning_rate": 0.1}, SPLITS, model(vit), 20, False)["learning_rate"] == 0.1
    assert output.begin(settings | {"slice_columns": ["site"]}, SPLITS, model(vit), 20, True) != first
    assert yaml.safe_load(output.config.read_text(encoding="utf-8"))["slice_columns"] == ["site"]


def test_the_start_of_pissa_is_kept_and_never_overwritten(vit: Path, tmp_path: Path) -> None:
    """The adapter is converted back by it at the end; after training has begun it cannot be had again."""
    output, pissa = Output(tmp_path), model(vit, init_lora_weights="pissa")
    output.begin(flatten(Settings()), SPLITS, pissa, 0, False)
    first = (output.adapter_init / "adapter_model.safetensors").read_bytes()
    perturb(pissa)
    output.begin(flatten(Settings()), SPLITS, pissa, 4, False)
    assert (output.adapter_init / "adapter_model.safetensors").read_bytes() == first
    PeftModel.from_pretrained(load_base(str(vit), ["a", "b"]).model, output.adapter_init)


def test_a_start_from_scratch_has_its_own_start_of_pissa(vit: Path, tmp_path: Path) -> None:
    """The run before was killed before its first checkpoint, and had other settings."""
    output = Output(tmp_path)
    output.begin(flatten(Settings()), SPLITS, model(vit, init_lora_weights="pissa"), 0, False)
    output.begin(flatten(Settings()), SPLITS, model(vit, init_lora_weights="pissa", use_rslora=True), 0, False)
    config = json.loads((output.adapter_init / "adapter_config.json").read_text())
    assert config["use_rslora"] is True


def test_a_run_that_lost_the_start_of_pissa_is_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter_init is missing"):
        Output(tmp_path / "run").begin(flatten(Settings()), SPLITS, model(vit, init_lora_weights="pissa"), 4, False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\x00", b"a: [", b"- a list"], ids=repr)
def test_settings_of_before_that_cannot_be_read_are_written_anew(
    rubbish: bytes, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("no")
    output, settings = Output(tmp_path), flatten(Settings())
    output.config.write_bytes(rubbish)
    output.begin(settings, SPLITS, model(vit), 0, False)
    assert f"cannot read {output.config}" in capsys.readouterr().err
    assert yaml.safe_load(output.config.read_text(encoding="utf-8"))["seed"] == settings["seed"]


@pytest.mark.root
def test_settings_stay_where_there_is_no_room_for_new_ones(
    vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("no")
    with small_disk(tmp_path / "disk", "100k") as disk:
        output, settings = Output(disk), flatten(Settings())
        output.begin(settings, SPLITS, model(vit), 0, False)
        before = output.config.read_bytes(), output.split.read_bytes()
        fill(disk)
        output.begin(settings | {"seed": 43}, SPLITS, model(vit), 3, False)
        assert (output.config.read_bytes(), output.split.read_bytes()) == before
        assert not list(disk.glob(".*"))
    assert f"cannot write {output.config}: No space left on device" in capsys.readouterr().err
