"""Whether all processes are about to make the same run: position, data, base, packages, and one directory."""

import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lora_dist import waiting
from lora_dist.errors import UserError
from lora_dist.processes.runtime import versions

VISIBLE_SECONDS = 90.0
"""Within which a new file is seen everywhere. NFS may remember for a minute that a directory was not there."""


def require_agreement(
    accelerator: Accelerator, output_dir: Path | None, facts: Mapping[str, Any], seconds: float = VISIBLE_SECONDS
) -> None:
    """Compares what the processes go by; called on every process, before anything is trained.

    Args:
        accelerator: of the launch.
        output_dir: made by the first process, and to be seen by all; None for a run that writes nothing.
        facts: name to value of what has to be the same.
        seconds: to wait for what the first process writes.

    Raises:
        UserError: on every process; it names what differs, and which ranks on which hosts have what.
    """
    if accelerator.num_processes == 1:
        return
    own = {**facts, **{f"version of {name}": version for name, version in versions().items()}}
    token = None
    if output_dir is not None:
        token = _write_token(accelerator, output_dir)
        own["--output_dir"] = "the same" if _appears(token, seconds) else f"another one, {output_dir.resolve()}"
    everyone = gather_object([(socket.gethostname(), own)])
    if token is not None and accelerator.is_main_process:
        token.unlink(missing_ok=True)
    found = differences([host for host, _ in everyone], [known for _, known in everyone])
    if found:
        raise UserError(
            "\n  ".join(["the processes of this launch differ:", *found])
            + "\nAll nodes need the same environment, the same data and model, and an --output_dir that they share."
        )


def differences(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each fact that is not the same on all ranks.

    Args:
        hosts: of each rank.
        facts: of each rank, under the same names.
    """
    lines = []
    for name in facts[0]:
        ranks: dict[str, list[int]] = {}
        for rank, known in enumerate(facts):
            ranks.setdefault(str(known[name]), []).append(rank)
        if len(ranks) > 1:
            shown = (f"{value} on {_places(members, hosts)}" for value, members in ranks.items())
            lines.append(f"{name}: {'; '.join(shown)}")
    return lines


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Such as `rank 0, 1 (node1), 2, 3 (node2)`."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return "rank " + ", ".join(f"{', '.join(numbers)} ({host})" for host, numbers in by_host.items())


def _write_token(accelerator: Accelerator, output_dir: Path) -> Path:
    """A file of the first process, under a name that was never there."""
    token, problem = output_dir / f".seen-{uuid.uuid4().hex}", None
    if accelerator.is_main_process:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            token.touch()
        except OSError as error:
            problem = f"cannot write to --output_dir: {error}"
    name, problem = broadcast_object_list([token.name, problem])
    if problem is not None:
        raise UserError(problem)
    return output_dir / name


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    with waiting.told(f"waiting to see in {path.parent} what rank 0 wrote there; giving up after {seconds:.0f} s"):
        while not _is_there(path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return True


def _is_there(path: Path) -> bool:
    # Reading the directories makes NFS ask the server, rather than what it remembers.
    try:
        list(path.parent.parent.iterdir())
        return path in path.parent.iterdir()
    except OSError:
        return False
