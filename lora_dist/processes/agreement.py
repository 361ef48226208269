"""Checks that all processes start the same run: step, data, base model, package versions, output directory."""

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
"""Time limit for a new file to become visible on all nodes. NFS clients may cache a missing entry for a minute."""


def require_agreement(
    accelerator: Accelerator, output_dir: Path | None, facts: Mapping[str, Any], seconds: float = VISIBLE_SECONDS
) -> None:
    """Compares `facts` across all processes. Must be called on every process, before training starts.

    Args:
        output_dir: created by rank 0; all processes must see it. None for a run that writes nothing.
        facts: values that must be equal on all processes, by name.
        seconds: how long to wait for the file that rank 0 writes.

    Raises:
        UserError: on every process. The message lists each difference: its values, ranks and hosts.
    """
    if accelerator.num_processes == 1:
        return
    own = {**facts, **{f"version of {name}": version for name, version in versions().items()}}
    token = None
    if output_dir is not None:
        token = _write_token(accelerator, output_dir)
        own["--output_dir"] = "shared" if _appears(token, seconds) else f"not shared ({output_dir.resolve()})"
    everyone = gather_object([(socket.gethostname(), own)])
    if token is not None and accelerator.is_main_process:
        token.unlink(missing_ok=True)
    found = differences([host for host, _ in everyone], [known for _, known in everyone])
    if found:
        raise UserError(
            "\n  ".join(["these values differ between the processes:", *found])
            + "\nAll nodes need the same environment, the same data and model, and an --output_dir that they share."
        )


def differences(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one line for each value that differs between ranks.

    Args:
        hosts: of each rank.
        facts: values of each rank, by name; all ranks have the same names.
    """
    lines = []
    for name in facts[0]:
        ranks: dict[str, list[int]] = {}
        for rank, known in enumerate(facts):
            ranks.setdefault(str(known[name]), []).append(rank)
        if len(ranks) > 1:
            shown = (f"{value} on {_format_ranks(members, hosts)}" for value, members in ranks.items())
            lines.append(f"{name}: {'; '.join(shown)}")
    return lines


def _format_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Such as `rank 0, 1 (node1), 2, 3 (node2)`."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return "rank " + ", ".join(f"{', '.join(numbers)} ({host})" for host, numbers in by_host.items())


def _write_token(accelerator: Accelerator, output_dir: Path) -> Path:
    """Creates a file with a unique name on rank 0 and returns its path on every process."""
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
    with waiting.log_wait(f"waiting for a file of rank 0 to appear in {path.parent}; giving up after {seconds:.0f} s"):
        while not _is_there(path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return True


def _is_there(path: Path) -> bool:
    # Reading the directories makes NFS ask the server instead of its cache.
    try:
        list(path.parent.parent.iterdir())
        return path in path.parent.iterdir()
    except OSError:
        return False
