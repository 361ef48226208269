"""Processes that would not make the same run end before it, all of them, and say how they differ."""

import socket
from importlib import metadata
from pathlib import Path

from lora_dist_testing.launching import run, said_by_processes

SCRIPT = """
import os, sys
from pathlib import Path
from lora_dist.processes.agreement import require_agreement
from lora_dist.errors import UserError
from lora_dist.processes.lifetime import exit_on_user_error
from lora_dist.processes import runtime

rank, here = int(os.environ["RANK"]), Path(__file__).parent
if rank:
    sys.path.insert(0, str(here / "other_releases"))
accelerator = runtime.launch("no", 60)
try:
    require_agreement(accelerator, here / "file" / "run", {"seed": 42})
except UserError as error:
    print(f"rank {rank}: {error}", flush=True)

@exit_on_user_error
def main():
    require_agreement(accelerator, here / f"own-{rank}", {"seed": 42 + rank, "base": "same"}, 1)

main()
"""


def test_processes_that_differ_end_before_they_train(tmp_path: Path) -> None:
    """One that starts from other data, or on a disk of its own, would make the others wait, or train rubbish."""
    (tmp_path / "file").touch()
    release = tmp_path / "other_releases" / "evaluate-99.0.dist-info" / "METADATA"
    release.parent.mkdir(parents=True)
    release.write_text("Metadata-Version: 2.1\nName: evaluate\nVersion: 99.0\n", encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    words = ("--standalone", "--nproc_per_node", 2, tmp_path / "script.py")
    result = run("torch.distributed.run", *words, code=1)
    host = socket.gethostname()
    for rank in (0, 1):
        assert f"rank {rank}: cannot write to --output_dir: " in result.stdout
    assert said_by_processes(result).count("error: these values differ between the processes:") == 1
    assert f"seed: 42 on rank 0 ({host}); 43 on rank 1 ({host})" in result.stderr
    own = tmp_path.resolve() / "own-1"
    assert f"--output_dir: shared on rank 0 ({host}); not shared ({own}) on rank 1 ({host})" in result.stderr
    releases = f"{metadata.version('evaluate')} on rank 0 ({host}); 99.0 on rank 1 ({host})"
    assert f"version of evaluate: {releases}" in result.stderr
    assert said_by_processes(result).count("version of ") == 1
    assert "base:" not in result.stderr
    assert list((tmp_path / "own-0").iterdir()) == []
