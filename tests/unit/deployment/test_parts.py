"""Parts of a prediction: what makes them those of the same one."""

import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore

from lora_dist.deployment.classify import Row
from lora_dist.deployment.inputs import Files
from lora_dist.deployment.parts import Parts, digest_of
from lora_dist.errors import UserError
from lora_dist.processes import run_lock

FILES = [f"photo {number}.jpg" for number in range(130)]


def _rows(indices: Sequence[int], **fields: Any) -> Iterator[Row]:
    return (Row(FILES[index], [("émoji 🦊", 1 / 3)], **fields) for index in indices)


def test_rows_come_back_as_they_were_and_in_order(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "rows.csv", ["day", "night"], Files(FILES), {"top_k": 1})
    parts.write({name: partial(_rows, adapter=name) for name in ("day", "night")})
    expected = [row for name in ("day", "night") for row in _rows(range(len(FILES)), adapter=name)]
    assert list(parts.rows()) == expected
    parts.remove()
    assert not parts.directory.exists()


@pytest.mark.parametrize("count", [7, len(FILES)], ids=["while writing", "while joining"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("the disk is full")], ids=["Ctrl-C", "full disk"])
def test_an_end_before_its_time_says_what_is_kept(
    error: BaseException, count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def ended(indices: Sequence[int]) -> Iterator[Row]:
        yield from _rows(indices[:count])
        raise error

    def predict() -> None:
        parts.write({None: ended if count < len(FILES) else _rows})
        raise error

    parts = Parts(tmp_path / "rows.csv", [None], Files(FILES), {})
    with pytest.raises(type(error)), parts.kept_rows_reported():
        predict()
    kept = {7: 6, len(FILES): len(FILES)}[count]
    assert f"{parts.directory} has {kept} of 130 rows: the same command continues from them" in caplog.text


def _hold(output: Path, ready: Any) -> None:
    Parts(output, [None], Files(FILES), {})
    ready.set()
    time.sleep(600)


def test_a_second_prediction_into_the_same_file_waits_or_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the one that ends first removes the parts of the other, which then empties the finished output."""
    monkeypatch.setattr(run_lock, "SAME_HOST_SECONDS", 0.1)
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=_hold, args=(tmp_path / "rows.csv", ready), daemon=True)
    other.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=rf"--output .*rows.csv is in use by another run: process {other.pid}"):
        Parts(tmp_path / "rows.csv", [None], Files(FILES), {})
    other.kill()
    other.join()
    parts = Parts(tmp_path / "rows.csv", [None], Files(FILES), {})
    parts.write({None: _rows})
    parts.remove()
    assert not list(tmp_path.iterdir())


def test_values_come_back_to_the_bit(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(len(FILES), 7)).astype(np.float32)
    parts = Parts(tmp_path / "rows.parquet", [None], Files(FILES), {})
    parts.write({None: lambda indices: (Row(FILES[i], [("a", 0.5)], values=numbers[i]) for i in indices)})
    assert np.array_equal(np.stack([row.values for row in parts.rows() if row.values is not None]), numbers)


@pytest.mark.parametrize("change", [{"top_k": 2}, {"max_image_pixels": 9}, {"labels": ["a"]}, {"files": FILES[1:]}])
def test_parts_of_another_prediction_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    plan = {"top_k": 1, "max_image_pixels": None, "labels": None}
    Parts(tmp_path / "rows.jsonl", [None], Files(FILES), dict(plan))
    Parts(tmp_path / "rows.jsonl", [None], Files(FILES), dict(plan))
    files: Any = change.pop("files", FILES)
    with pytest.raises(UserError, match="parts of a prediction of other images, or by another model"):
        Parts(tmp_path / "rows.jsonl", [None], Files(files), plan | change)


def test_rows_of_images_that_changed_since_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of those alone that were written before the change; files that are not there stay as they are."""
    files = [str(tmp_path / name) for name in FILES]
    for file in files[1:]:
        Path(file).touch()
    made: list[int] = []

    def rows(indices: Sequence[int]) -> Iterator[Row]:
        made.extend(indices)
        return _rows(indices)

    Parts(tmp_path / "rows.jsonl", [None], Files(files), {}).write({None: rows})
    time.sleep(0.02)  # the clock of a file system
    made.clear()
    os.utime(files[7], (1, 1))  # as a copy that keeps the times of the new file
    with caplog.at_level(logging.INFO):
        Parts(tmp_path / "rows.jsonl", [None], Files(files), {}).write({None: rows})
    assert made == [6, 7, 8]
    assert "3 rows are made again, because images changed since" in caplog.text


def test_a_process_that_starts_later_removes_no_part_that_the_first_one_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an image is changed while the other processes still load the model."""
    files = [str(tmp_path / name) for name in FILES]
    for file in files:
        Path(file).touch()
    Parts(tmp_path / "rows.jsonl", [None], Files(files), {}).write({None: _rows})
    store = HashStore()
    monkeypatch.setattr("lora_dist.deployment.parts.launch_store", lambda _: store)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = Parts(tmp_path / "rows.jsonl", [None], Files(files), {})
    time.sleep(0.02)  # the clock of a file system
    os.utime(files[7])
    monkeypatch.setenv("RANK", "1")
    Parts(tmp_path / "rows.jsonl", [None], Files(files), {}).write({None: _rows})
    assert len(list(first.rows())) == len(files)


def test_a_part_that_is_missing_is_said(tmp_path: Path) -> None:
    """As on machines that do not share the directory."""
    parts = Parts(tmp_path / "rows.jsonl", [None], Files(FILES), {})
    with pytest.raises(UserError, match=r"part-000000.jsonl is missing: do all processes see the same directory"):
        list(parts.rows())


def test_the_digest_of_a_model_depends_on_its_content_alone(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "elsewhere" / "other"
    one.mkdir()
    (one / "config.json").write_text("{}")
    (one / "weights").write_bytes(b"abc")
    shutil.copytree(one, other)
    os.utime(other / "weights", (1, 1))
    assert digest_of(one) == digest_of(other)
    (other / "weights").write_bytes(b"abd")
    assert digest_of(one) != digest_of(other)
    assert digest_of(one / "weights") != digest_of(other / "weights")
