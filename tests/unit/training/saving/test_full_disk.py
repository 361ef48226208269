"""A disk that is full, or a directory that is deleted, in the middle of a run: no result is lost."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lora_dist_testing.disks import fill, small_disk
from lora_dist_testing.hub_server import point_client_at, serving
from lora_dist_testing.launching import adapter_of, lines_of, results_of, run_flags, saved_in, scalars_of

from lora_dist import train
from lora_dist.training.reporting.tracking import Tracker
from lora_dist.training.saving import checkpoint

# No thread ends with a traceback.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MB."""
    with small_disk(tmp_path / "disk", "8m") as directory:
        yield directory


def _run(
    vit: Path,
    photos: Path,
    out: Path,
    acts: dict[int, Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
    *more: object,
) -> None:
    """Nine updates with an evaluation and a checkpoint after each; something happens after some of them."""
    advance = Tracker.advance

    def watched(self: Tracker, step: int, loss: float, samples_per_second: float) -> None:
        advance(self, step, loss, samples_per_second)
        if step in acts:
            acts[step]()

    arguments = (
        *run_flags(
            vit,
            photos,
            out,
            logging_steps=1,
            eval_steps=1,
            checkpointing_steps=1,
            max_train_steps=9,
            metric_for_best_model="loss",
        ),
        *more,
    )
    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "advance", watched)
        train.main([str(word) for word in arguments])


@pytest.fixture
def undisturbed(vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    _run(vit, photos, tmp_path / "undisturbed", {}, monkeypatch)
    return tmp_path / "undisturbed"


def _same_adapter(one: Path, other: Path) -> bool:
    expected = adapter_of(other)
    return all(tensor.equal(expected[name]) for name, tensor in adapter_of(one).items())


@pytest.mark.root
def test_a_run_gets_over_a_disk_that_is_full_for_a_while(
    vit: Path,
    photos: Path,
    disk: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    seen: list[int] = []

    def make_room() -> None:
        seen.append(saved_in(disk / "run")["step"])
        (disk / "ballast").unlink()

    _run(vit, photos, disk / "run", {3: lambda: fill(disk), 6: make_room}, monkeypatch)
    assert seen == [2], "what was saved when the disk was full"
    said = capfd.readouterr().err
    assert "cannot write the checkpoint of update 3: " in said
    assert "No space left on device" in said
    assert saved_in(disk / "run")["step"] == 9
    assert not list((disk / "run" / "checkpoints").glob(".*"))
    assert _same_adapter(disk / "run", undisturbed)
    logged = [line["step"] for line in lines_of(disk / "run") if "train/loss" in line]
    assert logged == list(range(1, 10)), "lines wait for room"
    assert results_of(disk / "run")["eval_loss"] == results_of(undisturbed)["eval_loss"]


@pytest.mark.root
@pytest.mark.parametrize("room", ["4k", "16k"], ids=["nothing", "the card"])
def test_no_room_for_what_is_to_be_pushed_costs_that_push_alone(
    room: str,
    vit: Path,
    photos: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with small_disk(tmp_path / "small", room) as small, serving() as hub:
        point_client_at(hub.url, tmp_path / "cache", monkeypatch)
        acts = {1: lambda: (run / "outbox").symlink_to(small)}
        _run(vit, photos, run, acts, monkeypatch, "--push_to_hub")
    assert "cannot write the files for the Hub: " in capfd.readouterr().err
    assert _same_adapter(run, undisturbed)
    assert len(hub.messages("ada/run")) == 1
    assert hub.repositories["ada/run"].files == {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}


@pytest.mark.root
def test_a_result_that_cannot_be_written_is_an_error_with_the_way_on(
    vit: Path,
    photos: Path,
    disk: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        _run(vit, photos, disk / "run", {3: lambda: fill(disk)}, monkeypatch)
    assert end.value.code == 1
    message = capfd.readouterr().err
    assert f"cannot write the result to {disk / 'run'}" in message
    assert "--resume_from_checkpoint auto resumes from update 2" in message
    (disk / "ballast").unlink()
    _run(vit, photos, disk / "run", {}, monkeypatch, "--resume_from_checkpoint", "auto")
    assert _same_adapter(disk / "run", undisturbed)


@pytest.mark.root
@pytest.mark.usefixtures("handlers")
def test_a_stop_that_cannot_be_saved_does_not_say_that_it_was(
    vit: Path, photos: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fill_and_stop() -> None:
        fill(disk)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)

    with pytest.raises(SystemExit) as end:
        _run(vit, photos, disk / "run", {3: fill_and_stop}, monkeypatch)
    assert end.value.code == 1
    message = capfd.readouterr().err
    assert "asked to stop after update 3 of 9, which could not be saved" in message
    assert "resumes from update 2" in message


def test_a_directory_that_is_deleted_gets_all_that_comes_after(
    vit: Path,
    photos: Path,
    tmp_path: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    _run(vit, photos, run, {4: lambda: shutil.rmtree(run)}, monkeypatch)
    assert "was removed; the curves start again" in capfd.readouterr().err
    assert _same_adapter(run, undisturbed)
    assert results_of(run)["step"] == 9
    assert [line["step"] for line in lines_of(run) if "train/loss" in line] == list(range(4, 10))
    assert [step for step, _ in scalars_of(run, "train/loss")] == list(range(4, 10))


def test_the_best_weights_outlive_a_directory_that_is_deleted(
    vit: Path, misled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    _run(vit, misled, undisturbed, {}, monkeypatch)
    best = results_of(undisturbed)["best_step"]
    assert best < 8, "to be deleted after it"
    _run(vit, misled, run, {best + 1: lambda: shutil.rmtree(run)}, monkeypatch)
    assert results_of(run)["best_step"] == best
    assert _same_adapter(run, undisturbed)


def test_weights_too_large_to_keep_in_memory_leave_the_last_ones_when_deleted(
    vit: Path, misled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_dist.training.saving.checkpointer.KEPT_IN_MEMORY", 0)
    run = tmp_path / "run"
    _run(vit, misled, run, {8: lambda: shutil.rmtree(run)}, monkeypatch)
    said = capfd.readouterr().err
    assert "cannot be read any more (no such directory)" in said
    assert "the result has the last weights instead of the best ones" in said
    results = results_of(run)
    assert (results["step"], results["best_step"]) == (9, None)
    last = checkpoint.read(checkpoint.path_of(run / "checkpoints", 9)).trained
    adapter = adapter_of(run)
    assert last["base_model.model.classifier.modules_to_save.default.bias"].equal(
        adapter["base_model.model.classifier.bias"]
    )
