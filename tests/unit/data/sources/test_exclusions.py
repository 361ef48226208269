"""Lists of files to leave out: any name comes back as it was, and what is no list is refused."""

import os
from pathlib import Path

import pytest

from lora_dist.data.sources.exclusions import Section, read_exclusions, write_exclusions
from lora_dist.errors import UserError

NAMES = (
    "plain.png",
    "with space.png",
    " leading and trailing ",
    "two\nlines.png",
    "return\r",
    "#comment.png",
    '"quoted".png',
    "back\\slash.png",
    "tab\t.png",
    "émoji 🦊.png",
    "line\u2028separator.png",
    os.fsdecode(b"not utf-8 \xff.png"),
)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    write_exclusions(file, [Section("broken", [str(tmp_path / name)])])
    assert read_exclusions(file) == {str(tmp_path / name)}
    paths = [line for line in file.read_text(encoding="utf-8").split("\n") if line and not line.startswith("#")]
    assert len(paths) == 1


def test_names_that_are_relative_start_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are written: by the audit, absolutely; by a person, as `ls` or `find` print them."""
    monkeypatch.chdir(tmp_path)
    write_exclusions(tmp_path / "list.txt", [Section("broken", [f"train/a/{name}" for name in NAMES])])
    expected = {f"{tmp_path}/train/a/{name}" for name in NAMES}
    assert read_exclusions("list.txt") == expected
    monkeypatch.chdir("/")
    assert read_exclusions(tmp_path / "list.txt") == expected
    (tmp_path / "own.txt").write_text("./a/1.png\na/../b/2.png\n\n# a note\n/c/3.png")
    monkeypatch.chdir(tmp_path)
    assert read_exclusions("own.txt") == {f"{tmp_path}/a/1.png", f"{tmp_path}/b/2.png", "/c/3.png"}


def test_what_is_proposed_is_not_left_out_until_its_mark_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    write_exclusions(file, [Section("broken", ["/a"]), Section("perhaps", ["/b", "/c\n"], active=False)])
    assert read_exclusions(file) == {"/a"}
    file.write_text(file.read_text().replace("#/b", "/b").replace('#"/c', '"/c'))
    assert read_exclusions(file) == {"/a", "/b", "/c\n"}


def test_files_of_other_systems_are_read(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeff/a b.png\r\n/é.png\r\n".encode() + b"/raw \xff.png\r\n")
    assert read_exclusions(file) == {"/a b.png", "/é.png", os.fsdecode(b"/raw \xff.png")}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'/fine\n"unfinished\n', 'line 2: "unfinished is not a JSON string'),
        (b'"a" and more\n', "line 1"),
        (b'"null \\u0000"\n', "line 1: not a path"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "line 3: not a path; the list is a text file"),
    ],
)
def test_what_is_no_list_is_refused_by_its_line(content: bytes, part: str, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_exclusions(file)
    assert f"--exclude {file}, {part}" in str(caught.value)


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=f"--exclude {file}: "):
            read_exclusions(file)


@pytest.mark.parametrize("content", ["", "# Files to leave out\n\n#/proposed.png\n"])
def test_a_list_that_leaves_nothing_out_says_so(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "list.txt").write_text(content)
    assert read_exclusions(tmp_path / "list.txt") == frozenset()
    assert f"--exclude {tmp_path / 'list.txt'}: the list names no file" in caplog.text
