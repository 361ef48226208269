"""Predictions as parquet: what a file holds, and when it appears."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import pytest

from lora_dist.deployment import outputs
from lora_dist.deployment.classify import Row
from lora_dist.deployment.outputs import RECORD, writer
from lora_dist.errors import UserError

LISTS: tuple[Literal["probabilities", "logits", "embeddings"], ...] = ("probabilities", "logits", "embeddings")


def _write(path: Path, rows: list[Row], **options: Any) -> None:
    with writer(str(path), None, 2, **options) as write:
        for row in rows:
            write(row)


def test_parquet_has_the_columns_of_json_lines(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    rows = [Row("é.png", [("a, b", 0.75), ("🦊", 0.25)]), Row(odd, [], "broken")]
    _write(tmp_path / "rows.parquet", rows, record={"labels": ["a, b", "🦊"]})
    table = pq.read_table(tmp_path / "rows.parquet")
    best = [{"label": "a, b", "score": 0.75}, {"label": "🦊", "score": 0.25}]
    assert table.to_pylist() == [
        {"path": "é.png", "label": "a, b", "score": 0.75, "top_k": best, "error": None},
        {"path": "caf\\udce9.png", "label": None, "score": None, "top_k": None, "error": "broken"},
    ]
    assert json.loads(table.schema.metadata[RECORD]) == {"labels": ["a, b", "🦊"]}
    _write(tmp_path / "set.parquet", [row._replace(adapter="day") for row in rows], with_adapter=True)
    assert pq.read_table(tmp_path / "set.parquet")["adapter"].to_pylist() == ["day", "day"]


@pytest.mark.parametrize("output_type", LISTS)
def test_lists_of_numbers_are_in_parquet_to_the_bit_and_in_json(output_type: Any, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    rows = [Row(f"{index}.png", [("a", 0.5)], values=values) for index, values in enumerate(numbers)]
    rows.insert(2, Row("bad.png", [], "broken"))
    for name in ("rows.parquet", "rows.jsonl"):
        _write(tmp_path / name, rows, output_type=output_type)
    found = pq.read_table(tmp_path / "rows.parquet")[output_type].to_pylist()
    assert found.pop(2) is None
    assert np.array_equal(np.array(found, dtype=np.float32), numbers)
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert lines.pop(2) == {"path": "bad.png", "error": "broken"}
    assert np.array_equal(np.array([line[output_type] for line in lines], dtype=np.float32), numbers)
    assert lines[0].keys() == {"path", "label", "score", output_type}


def test_rows_are_written_in_groups_that_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "GROUP_ROWS", 10)
    monkeypatch.setattr(outputs, "GROUP_NUMBERS", 20)
    for width, groups in ((1, 3), (7, 9)):
        rows = [Row(f"{index}", [("a", 0.5)], values=np.zeros(width, np.float32)) for index in range(25)]
        _write(tmp_path / "rows.parquet", rows, output_type="logits")
        file = pq.ParquetFile(tmp_path / "rows.parquet")
        assert file.metadata.num_row_groups == groups
        assert file.read()["path"].to_pylist() == [row.path for row in rows]


def test_a_parquet_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    _write(tmp_path / "rows.parquet", [Row("first", [("a", 0.5)])])
    with pytest.raises(IndexError, match="list index"), writer(str(tmp_path / "rows.parquet"), None, 1) as write:
        # A row needs a class or an error.
        write(Row("second", []))
    assert pq.read_table(tmp_path / "rows.parquet")["path"].to_pylist() == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


@pytest.mark.parametrize("format_", ["jsonl", "csv"])
def test_a_full_disk_behind_standard_output_is_told_in_one_sentence(
    format_: Literal["jsonl", "csv"], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: PTH123, SIM115
    monkeypatch.setattr("sys.stdout", full)
    told = r"written to standard output \(No space left on device\)"
    with pytest.raises(UserError, match=told), writer(None, format_, 1) as write:
        write(Row("a.png", [("a", 0.5)]))
    with pytest.raises(OSError, match="No space"):
        full.close()
