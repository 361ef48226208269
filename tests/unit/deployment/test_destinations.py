"""Where predict may write: what is taken or cannot be made is said before anything else is done, all of it at once."""

import os
from pathlib import Path

import pytest
from lora_dist_testing.disks import small_disk

from lora_dist.deployment.destinations import require_destinations, require_free_directory
from lora_dist.errors import UserError
from lora_dist.settings.predict import PredictSettings
from lora_dist.storage.writable import writing


def _settings(**destinations: Path | str) -> PredictSettings:
    merging = {name: str(destinations[name]) for name in ("merge_to", "export_legacy_names") if name in destinations}
    images = {name: str(destinations[name]) for name in ("output", "grid", "explain") if name in destinations}
    onnx = {"onnx": str(destinations["onnx"])} if "onnx" in destinations else {}
    return PredictSettings.model_validate(
        {"source": {"adapter": ["a"]}, "merging": merging, "images": images, "exporting": onnx}
    )


def _problems(**destinations: Path | str) -> list[str]:
    with pytest.raises(UserError) as caught:
        require_destinations(_settings(**destinations))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_what_is_free_is_taken_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.csv").touch()
    require_destinations(
        _settings(
            merge_to=tmp_path / "empty",
            export_legacy_names=tmp_path / "new" / "old",
            onnx=tmp_path / "new" / "m.onnx",
            output=tmp_path / "old.csv",
            grid=tmp_path / "new" / "grid.png",
        )
    )
    require_destinations(_settings(merge_to=tmp_path / "new", output=tmp_path / "new" / "rows.csv"))
    require_destinations(_settings(output="/dev/null"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.csv"]


def test_all_that_is_taken_is_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    link = tmp_path / "dangling"
    link.symlink_to(tmp_path / "nowhere")
    file = tmp_path / "thesis.txt"
    problems = _problems(merge_to=tmp_path, export_legacy_names=link, onnx=file, output=tmp_path, grid=tmp_path)
    expected = [
        f"--export_legacy_names {link} is not empty",
        f"--merge_to {tmp_path} is not empty",
        f"--onnx {file} exists",
        f"--output {tmp_path} is a directory",
        f"--grid {tmp_path} is a directory",
    ]
    assert [problem.partition(";")[0] for problem in problems] == expected


@pytest.mark.parametrize("flag", ["merge_to", "export_legacy_names", "onnx", "explain", "output", "grid"])
def test_what_cannot_be_made_is_refused(flag: str, tmp_path: Path) -> None:
    """Below a file, and below what takes no files even from root."""
    (tmp_path / "file").touch()
    for parent in (tmp_path / "file", Path("/proc/nowhere")):
        (problem,) = _problems(**{flag: parent / "x"})
        assert problem.startswith(f"--{flag} {parent}")


@pytest.mark.parametrize(
    ("destinations", "words"),
    [
        ({"merge_to": "x", "export_legacy_names": "x"}, "--merge_to x: --export_legacy_names is written there first"),
        ({"merge_to": "x", "export_legacy_names": "x/y"}, "--merge_to x: --export_legacy_names is written there first"),
        ({"merge_to": "x", "onnx": "y/../x"}, "--onnx y/../x: --merge_to is written there first"),
        ({"merge_to": "x", "explain": "x"}, "--explain x: --merge_to is written there first"),
        ({"explain": "x", "output": "x"}, "--output x: --explain is written there first"),
        ({"output": "x", "grid": "x"}, "--grid x: --output is written there first"),
    ],
)
def test_two_things_in_one_place_are_refused(
    destinations: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = _problems(**destinations)
    assert problem.startswith(words)


@pytest.mark.root
def test_a_directory_that_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"--merge_to \.: this directory would be replaced"):
        require_free_directory(Path(), "merge_to")
    with (
        small_disk(tmp_path / "disk", "100k") as disk,
        pytest.raises(UserError, match=f"--merge_to {disk}: this directory would be replaced"),
    ):
        require_free_directory(disk, "merge_to")


@pytest.mark.root
def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "16k") as disk,
        pytest.raises(UserError, match=rf"--output {disk / 'x'}: cannot be written \(No space left on device\)"),
        writing(disk / "x", "output"),
    ):
        (disk / "x").write_bytes(bytes(100_000))


def test_heat_maps_may_lie_beside_other_outputs(tmp_path: Path) -> None:
    """Their directory is not replaced."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old.png").touch()
    inside = {"onnx": tmp_path / "x" / "model.onnx", "output": tmp_path / "x" / "rows.csv"}
    require_destinations(_settings(explain=tmp_path / "x", **inside))
    (problem,) = _problems(explain=tmp_path / "x" / "old.png")
    assert "is not a directory" in problem


def test_parquet_for_a_device_is_refused(tmp_path: Path) -> None:
    """It would replace /dev/null, which root can do; a terminal stands for it here, which nothing can replace."""
    master, terminal = os.openpty()
    (tmp_path / "rows.parquet").symlink_to(os.ttyname(terminal))
    (problem,) = _problems(output=tmp_path / "rows.parquet")
    assert problem.endswith("rows.parquet: not a file, as parquet needs; use --format jsonl or csv")
    for descriptor in (master, terminal):
        os.close(descriptor)
