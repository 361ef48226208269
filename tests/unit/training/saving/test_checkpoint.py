"""Checkpoints that a run can rely on: exact, verified, kept to a number, and never half there."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_dist.errors import UserError
from lora_dist.storage.atomic import finish_replacing
from lora_dist.training.saving import checkpoint
from lora_dist.training.saving.checkpoint import COMPLETE, OPTIMIZER, STATE, TRAINED, Checkpoint

FILES = (TRAINED, OPTIMIZER, STATE, COMPLETE)


def content(step: int = 3) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        trained={
            "a.weight": torch.randn(4, 3, generator=generator),
            "batch_norm.num_batches_tracked": torch.tensor(7),
            "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        },
        optimizer={
            "exp_avg/a.weight": torch.randn(4, 3, generator=generator) * 1e-30,
            "step/a.weight": torch.tensor(float(step)),
        },
        state={"progress": {"step": step, "loss_sum": 0.1 + 0.2, "best_value": None}, "scaler": None},
    )


def assert_same(read: Checkpoint, written: Checkpoint) -> None:
    for found, expected in ((read.trained, written.trained), (read.optimizer, written.optimizer)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert read.state == written.state


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.listed(root)]


def test_what_is_written_is_read_to_the_bit(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path / "checkpoints", 3, content())
    assert path == checkpoint.path_of(tmp_path / "checkpoints", 3)
    assert checkpoint.find_damage(path) is None
    assert_same(checkpoint.read(path), content())
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_of_a_run_that_has_no_moments_yet_is_read_too(tmp_path: Path) -> None:
    written = Checkpoint(content().trained, {}, {"progress": {"step": 0}})
    assert_same(checkpoint.read(checkpoint.write(tmp_path, 0, written)), written)


def test_a_checkpoint_of_the_same_step_replaces_the_old_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 3, content(3))
    checkpoint.write(tmp_path, 3, content(4))
    assert_same(checkpoint.read(checkpoint.path_of(tmp_path, 3)), content(4))
    assert len(list(tmp_path.iterdir())) == 1


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    """safetensors makes its files readable by their owner alone, and a group shares a cluster's disk."""
    before = os.umask(0o022)
    try:
        path = checkpoint.write(tmp_path, 3, content())
    finally:
        os.umask(before)
    assert {(path / name).stat().st_mode & 0o777 for name in FILES} == {0o644}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    """Changes a bit in the middle, of the numbers in a tensor or a digest, so that the file still parses."""
    data = bytearray(path.read_bytes())
    index = len(data) - 8 if path.suffix == ".safetensors" else next(i for i, c in enumerate(data) if chr(c).isdigit())
    data[index] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zero(path: Path) -> None:
    """As a power cut leaves files on some file systems: the length is there and the content is not."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[Callable[[Path], None]] = [_truncate, _flip, _empty, _zero, Path.unlink]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_after_any_damage_the_older_one_is_read_and_the_reader_told(
    damage: Callable[[Path], None], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.write(tmp_path, 3, content(3))
    newest = checkpoint.write(tmp_path, 4, content(4))
    assert checkpoint.read_newest(tmp_path)[0] == newest  # type: ignore[index]
    damage(newest / name)
    assert checkpoint.find_damage(newest)
    with pytest.raises(UserError, match=f"cannot resume from {newest}: .*({name}|corrupt)"):
        checkpoint.read(newest)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.read_newest(tmp_path)
    assert found is not None
    assert found[0] == checkpoint.path_of(tmp_path, 3)
    assert_same(found[1], content(3))
    assert "skipping a damaged checkpoint" in caplog.text
    assert str(newest) in caplog.text
    assert newest.is_dir(), "what is damaged may still be of use to somebody"


@pytest.mark.parametrize("text", ["null", "[]", '"text"', "3", "{}", '{"trained.safetensors": 1}', "{"])
def test_any_rubbish_in_the_manifest_is_damage(text: str, tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 3, content())
    (path / COMPLETE).write_text(text)
    assert checkpoint.find_damage(path)
    assert checkpoint.read_newest(tmp_path) is None


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.read_newest(tmp_path) is None
    assert checkpoint.read_newest(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match="no such directory"):
        checkpoint.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="incomplete"):
        checkpoint.read(tmp_path)


def test_the_newest_is_that_of_the_highest_step_and_not_of_the_latest_write(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        checkpoint.write(tmp_path, step, content(step))
    assert steps(tmp_path) == [9, 20, 100]
    assert checkpoint.read_newest(tmp_path)[0] == checkpoint.path_of(tmp_path, 100)  # type: ignore[index]


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 5, [4, 5]),
        (1, 4, [4, 5]),
        (9, 2, [1, 2, 3, 4, 5]),
        (1, 99, [5]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(keep: int, best: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.write(tmp_path, step, content(step))
    checkpoint.prune(tmp_path, keep, best)
    assert steps(tmp_path) == kept
    assert all(checkpoint.find_damage(path) is None for path in checkpoint.listed(tmp_path))


def _write_for_ever(root: Path) -> None:
    for step in range(1, 1_000_000):
        checkpoint.write(root, step, content(step))
        checkpoint.prune(root, 2, None)


def test_a_process_that_is_killed_leaves_nothing_half_under_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(8):
        root = tmp_path / str(number)
        process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(root,))
        process.start()
        while not checkpoint.listed(root):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
        found = checkpoint.listed(root)
        assert 1 <= len(found) <= 3
        assert all(checkpoint.find_damage(path) is None for path in found)
        checkpoint.prune(root, 2, None)
        assert sorted(root.iterdir()) == found[-2:]


def test_leftovers_of_killed_writes_and_removals_go_at_the_next_pruning(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 3, content())
    for name in (".writing-step-00000004", ".removing-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / TRAINED).write_bytes(b"half")
    assert steps(tmp_path) == [3]
    checkpoint.prune(tmp_path, 2, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_leftover_does_not_get_into_the_next_checkpoint_of_that_step(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-00000003").mkdir()
    (tmp_path / ".writing-step-00000003" / "stale").write_text("old")
    path = checkpoint.write(tmp_path, 3, content())
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert len(list(tmp_path.iterdir())) == 1


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, bytes]]:
        return _leave, (str(self.mark), b"ran")


def _leave(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


@pytest.mark.parametrize("name", [TRAINED, OPTIMIZER])
def test_a_pickle_in_place_of_the_weights_runs_no_code(name: str, tmp_path: Path) -> None:
    """Even one with a manifest that vouches for it."""
    path = checkpoint.write(tmp_path, 3, content())
    (path / name).write_bytes(pickle.dumps(_Trap(tmp_path / "mark")))
    manifest = {file: checkpoint.digest(path / file) for file in (TRAINED, OPTIMIZER, STATE)}
    (path / COMPLETE).write_text(json.dumps(manifest))
    assert checkpoint.find_damage(path) is None
    assert checkpoint.read_newest(tmp_path) is None
    assert not (tmp_path / "mark").exists()
    pickle.loads((path / name).read_bytes())
    assert (tmp_path / "mark").exists(), "the trap works, so the test shows something"


def test_a_checkpoint_of_plain_safetensors_files_can_be_read_without_this_package(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 3, content())
    save_file(content().trained, tmp_path / "expected")
    assert (path / TRAINED).read_bytes() == (tmp_path / "expected").read_bytes()
    assert json.loads((path / STATE).read_text())["progress"]["step"] == 3


def test_no_module_runs_the_code_in_a_pickle() -> None:
    """Adapters of old releases are pickles, of which tensors alone are read."""
    loads = 0
    for path in (Path(checkpoint.__file__).parents[2]).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pickle\.loads?\(|Unpickler\(|allow_pickle", text), path
        calls = re.findall(r"torch\.load\(.*\)", text)
        assert all("weights_only=True" in call for call in calls), path
        assert len(calls) == text.count("torch.load("), path
        loads += len(calls)
    assert loads == 1


def test_pruning_counts_whole_checkpoints_alone(tmp_path: Path) -> None:
    """A damaged newer one must not push out the good one just written."""
    for step in (20, 40):
        checkpoint.write(tmp_path, step, content())
    (checkpoint.path_of(tmp_path, 40) / checkpoint.COMPLETE).unlink()
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["step-00000020"]


def test_a_truncated_checkpoint_is_none_that_pruning_counts(tmp_path: Path) -> None:
    for step in (20, 40):
        checkpoint.write(tmp_path, step, content())
    _truncate(checkpoint.path_of(tmp_path, 40) / TRAINED)
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert steps(tmp_path) == [20]


@pytest.mark.timeout(20)
def test_pruning_does_not_read_what_it_keeps(tmp_path: Path) -> None:
    """A tebibyte of it, most of which is a hole, would take half an hour at every save."""
    path = checkpoint.write(tmp_path, 20, content())
    os.truncate(path / TRAINED, 2**40)
    manifest = json.loads((path / COMPLETE).read_text())
    manifest[TRAINED]["bytes"] = 2**40
    (path / COMPLETE).write_text(json.dumps(manifest))
    checkpoint.prune(tmp_path, keep=1, best_step=None)
    assert steps(tmp_path) == [20]


def test_a_course_that_is_left_is_put_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint.write(tmp_path, step, content())
    checkpoint.abandon_after(tmp_path, 10)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["step-00000010"]
    assert (tmp_path / "abandoned-step-00000030" / COMPLETE).is_file()
    checkpoint.write(tmp_path, 30, content(1))
    checkpoint.abandon_after(tmp_path, 10)
    assert_same(checkpoint.read(tmp_path / "abandoned-step-00000030"), content())
    assert_same(checkpoint.read(tmp_path / "abandoned-step-00000030-2"), content(1))


def test_a_state_that_is_replaced_keeps_the_tensors_on_the_disk(tmp_path: Path) -> None:
    content = checkpoint.Checkpoint({"a": torch.ones(3)}, {"exp_avg/a": torch.zeros(3)}, {"best": None})
    path = checkpoint.write(tmp_path, 5, content)
    before = (path / checkpoint.TRAINED).stat().st_ino
    checkpoint.replace_state(tmp_path, 5, {"best": 1})
    assert checkpoint.read(path).state == {"best": 1}
    assert (path / checkpoint.TRAINED).stat().st_ino == before
    with pytest.raises(OSError, match="step-00000006"):
        checkpoint.replace_state(tmp_path, 6, {})


def test_a_checkpoint_that_was_killed_while_it_was_replaced_is_still_there(tmp_path: Path) -> None:
    """Between the two renames neither the old nor the new one has its name."""
    content = checkpoint.Checkpoint({"a": torch.ones(3)}, {}, {"best": None})
    path = checkpoint.write(tmp_path, 5, content)
    new = checkpoint.write(tmp_path / "other", 5, replace(content, state={"best": 1}))
    path.rename(tmp_path / f".removing-{path.name}")
    new.rename(tmp_path / f".writing-{path.name}")
    assert checkpoint.read_newest(tmp_path) is None
    finish_replacing(tmp_path)
    found = checkpoint.read_newest(tmp_path)
    assert found is not None
    assert found[1].state == {"best": 1}
