"""How a command ends on what the user can put right: a line and a code, once, and no traceback."""

import socket
from pathlib import Path

import pytest

from lora_dist.errors import ProcessError, TrainingStoppedError, UserError, first_line
from lora_dist.processes.lifetime import exit_on_user_error


@exit_on_user_error
def command(error: BaseException | None) -> str:
    if error is not None:
        raise error
    return "done"


@pytest.mark.parametrize(("error", "code"), [(UserError("no such thing"), 2), (TrainingStoppedError("stopped"), 1)])
def test_an_error_of_the_user_is_a_line_and_a_code(
    error: UserError, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        command(error)
    assert end.value.code == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "said"),
    [
        ("0", "0", UserError("no such thing"), "error: no such thing\n"),
        ("1", "1", UserError("no such thing"), ""),
        ("1", "1", ProcessError("alone"), f"error: rank 1 on {socket.gethostname()}: alone\n"),
        ("8", "0", UserError("no such thing"), f"error: rank 8 on {socket.gethostname()}: no such thing\n"),
    ],
)
def test_one_process_of_each_node_says_it_and_all_end(
    rank: str,
    local_rank: str,
    error: UserError,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others of a node would say the same; those of another node may have met what is wrong there alone."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as end:
        command(error)
    assert end.value.code == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("rank", "said"), [("0", "interrupted\n"), ("1", "")])
def test_ctrl_c_is_a_word_and_a_code(
    rank: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as end:
        command(KeyboardInterrupt())
    assert end.value.code == 130
    assert capsys.readouterr().err == said


def test_a_deleted_working_directory_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit):
        command(None)
    assert capsys.readouterr().err == "error: the working directory has been deleted; change to another one\n"


def test_a_mistake_in_the_program_keeps_its_traceback_and_success_its_result() -> None:
    with pytest.raises(ZeroDivisionError):
        command(ZeroDivisionError())
    assert command(None) == "done"


def test_the_first_line_of_an_error_without_a_message_is_its_type() -> None:
    found = [first_line(ValueError(text)) for text in ("", " \n\n", "\n one\ntwo")]
    assert found == ["ValueError", "ValueError", "one"]
