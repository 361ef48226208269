"""The launcher of torch reads why a process ended, and shows it at the end of its output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

COMMAND = """
import time
from lora_dist.errors import PreemptedError, UserError
from lora_dist.processes import lifetime, watch
watch.FIRST_SECONDS, watch.ANSWER_SECONDS = 0, 1
stalled = watch.Watch(0.5)
@lifetime.exit_on_user_error
def main():
    {body}
lifetime.run_command(main)
"""


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (
            "raise UserError('--train_dir x:\\nno such directory')",
            "error: --train_dir x:\n  no such directory",
        ),
        ("raise PreemptedError('after update 3')", "stopped: after update 3"),
        ("raise ZeroDivisionError('odd')", "ZeroDivisionError: odd"),
        ("raise SystemExit('no such thing')", "no such thing"),
        ("with stalled.watching(): stalled.enter('hangs'); time.sleep(60)", "error: no progress for"),
    ],
)
def test_the_summary_of_the_launcher_has_the_reason(body: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text(COMMAND.format(body=body), encoding="utf-8")
    file = tmp_path / "error.json"
    ended = subprocess.run(
        [sys.executable, tmp_path / "command.py"],
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(file)},
        timeout=60,
        check=False,
    )
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=ended.returncode, error_file=str(file))
    assert f"traceback : {shown}" in str(ChildFailedError("command", {0: failure}))
