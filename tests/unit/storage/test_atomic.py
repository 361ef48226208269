"""Removes the files and directories that a killed process was writing."""

from pathlib import Path

from lora_dist.storage.atomic import remove_leftovers


def test_files_and_directories_of_killed_processes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".writing-metrics.jsonl").write_bytes(b"half")
    (tmp_path / ".writing-step-1").mkdir()
    (tmp_path / "step-0").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0"]
