"""Processes that do not arrive, or do not reach each other, are found out in seconds and said in words."""

import re
import socket
import subprocess
from pathlib import Path

from lora_dist_testing.launching import flags, run, said_by_processes, train

SCRIPT = """
import os, time
from datetime import timedelta
from lora_dist.processes.lifetime import exit_on_user_error
from lora_dist.processes.preflight import Preflight
from lora_dist.processes.runtime import launch

def preflight(seconds):
    return Preflight(timedelta(seconds=seconds))

@exit_on_user_error
def main(rank):
    {main}

main(int(os.environ["RANK"]))
"""


def _torchrun(script: Path, processes: int, main: str) -> subprocess.CompletedProcess[str]:
    script.write_text(SCRIPT.format(main=main), encoding="utf-8")
    return run("torch.distributed.run", "--standalone", "--nproc_per_node", processes, script, code=1)


def test_a_rank_that_never_starts_is_named(vit: Path, photos: Path, tmp_path: Path) -> None:
    absent = "import os, time\nif os.environ.get('RANK') == '1':\n    time.sleep(600)\n"
    (tmp_path / "sitecustomize.py").write_text(absent, encoding="utf-8")
    result = train(
        *flags(model_name_or_path=vit, train_dir=photos / "train", output_dir=tmp_path / "run", ddp_timeout=5),
        launch_file="ddp_cpu.yaml",
        code=1,
        PYTHONPATH=str(tmp_path),
    )
    said = f"error: rank 1 of 2 did not arrive within 5 s. Arrived: 0 on {socket.gethostname()}. "
    assert said_by_processes(result).count(said) == 1
    assert "Traceback" not in result.stderr.partition(said)[0]
    assert "exitcode  : 2 " in result.stderr
    assert not (tmp_path / "run").exists()


def test_one_of_those_that_arrived_says_it_whichever_they_are(tmp_path: Path) -> None:
    main = "preflight(60).arrive('first'); time.sleep(600) if rank == 0 else preflight(3).arrive('then')"
    result = _torchrun(tmp_path / "script.py", 3, main)
    host = socket.gethostname()
    assert said_by_processes(result).count("did not arrive") == 1
    assert f"rank 0 of 3 did not arrive within 3 s. Arrived: 1 on {host}, 2 on {host}. " in result.stderr


def test_the_interconnect_is_timed_and_one_that_does_not_answer_is_said(tmp_path: Path) -> None:
    """The second time, only rank 0 joins the all-reduce."""
    main = "one = launch('no', 60); time.sleep(600) if rank == 1 else preflight(3).time_all_reduce(one)"
    result = _torchrun(tmp_path / "script.py", 2, main)
    timed = re.findall(r"2 processes; an all-reduce of 4 MiB takes ([\d.]+) ms", result.stderr)
    assert len(timed) == 1
    assert 0.1 < float(timed[0]) < 60_000
    said = "error: all 2 processes have arrived, but an all-reduce did not finish within 3 s. Check that"
    assert said_by_processes(result).count(said) == 1
    assert "Traceback" not in result.stderr.partition(said)[0]
    assert "exitcode  : 1 " in result.stderr
