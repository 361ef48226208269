"""A Slurm cluster of two nodes, n1 and n2, on this machine, with its key, sockets and files in one directory."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from lora_dist_testing.launching import ROOT, environment

SCRIPTS = ROOT / "slurm"

START_UP = 180
"""Seconds that a job may take to start training."""

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# A job's port follows from its number, and the tests of another file may have a cluster at the same time.
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits for its old credential to expire, two minutes by default.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
# What needs control groups or a database is left out.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
# Both nodes are this machine, whatever it has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout={slurmd_timeout}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
# A job in "high" takes the nodes from one in "low", which has a minute to save and is requeued.
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE GraceTime=60 PriorityTier=1
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def why_not() -> str | None:
    """What this machine lacks for a cluster, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "Slurm's daemons start jobs as their users, and need root for it"
    return None


def user_environment(**extra: str) -> dict[str, str]:
    """What a user's shell has: this Python first, this checkout, and no network."""
    here = environment(**({"PYTHONPATH": str(ROOT)} | extra))
    return here | {"PATH": f"{Path(sys.executable).parent}:{here['PATH']}"}


def log_of(job: str, directory: Path) -> str:
    """What the job log says so far of a job that was submitted in `place`."""
    return "\n".join(path.read_text(encoding="utf-8") for path in directory.glob(f"*-{job}.out"))


class Cluster:
    """The daemons, and the commands that talk to them."""

    def __init__(self, directory: Path, slurmd_timeout: int) -> None:
        """
        Args:
            directory: an empty one with a short path, because sockets live in it.
            slurmd_timeout: seconds after which Slurm takes a node that does not answer for down.
        """
        self.directory = directory
        self._slurmd_timeout = slurmd_timeout
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts the daemons and waits for both nodes."""
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._config.write_text(
            CONFIG.format(
                directory=self.directory,
                host=socket.gethostname().split(".")[0],
                ports=_free_ports(3),
                first_job=os.getpid() % 200 * 100 + 1,
                slurmd_timeout=self._slurmd_timeout,
            )
        )
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={self.directory}/munge.socket",
            f"--pid-file={self.directory}/munged.pid",
            f"--log-file={self.directory}/munged.log",
            f"--seed-file={self.directory}/munged.seed",
        )
        self.wait_for(lambda: (self.directory / "munge.socket").exists(), "munged", 30)
        self._daemon("slurmctld", "-D", "-L", self.directory / "slurmctld.log")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_for(lambda: self.call("sinfo", "-h", "-o", "%t %D", check=False).strip() == "idle 2", "nodes", 60)

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._nodes[node] = self._daemon("slurmd", "-D", "-N", node, "-L", self.directory / f"slurmd-{node}.log")

    def fail_node(self, node: str) -> None:
        """Kills all that runs on a node, as a loss of power does."""
        tasks = [one for one in self._processes() if one.environ().get("SLURMD_NODENAME") == node]
        # A process that looks after a task has the environment of the daemon, which names no node.
        keepers = [parent for one in tasks for parent in one.parents() if parent.name() == "slurmstepd"]
        # The daemons first, or they would tell that the task has ended.
        for one in (psutil.Process(self._nodes[node].pid), *keepers, *tasks):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._nodes[node].wait(20)

    def rank(self, number: int) -> psutil.Process:
        """The training process of a rank, of the only job that trains."""
        return next(
            one
            for one in self._processes()
            if one.cmdline()[1:3] == ["-m", "lora_dist.train"] and one.environ().get("RANK") == str(number)
        )

    def stop(self) -> None:
        """Cancels every job and ends the daemons, whatever state they are in."""
        if any(daemon.poll() is None for daemon in self._daemons[1:]):
            self.call("scancel", "--full", "--signal=KILL", "--user=root", check=False)
            self.call("scancel", "--user=root", check=False)
            end = time.monotonic() + 60
            while self.call("squeue", "-h", "-o", "%i %T", check=False).strip() and time.monotonic() < end:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)

    def call(self, *words: object, check: bool = True, cwd: Path | None = None, **extra: str) -> str:
        """Runs a command of Slurm and returns what it printed."""
        result = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=cwd,
            env=self.environment(**extra),
        )
        assert not check or result.returncode == 0, f"{words}: {result.stderr}"
        return result.stdout

    def submit(self, *words: object, cwd: Path, **extra: str) -> str:
        """Submits a job and returns its number."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **extra).strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says of a job, for instance its `JobState`."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def environment(self, **extra: str) -> dict[str, str]:
        """The environment in which Slurm's commands find this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self._config)} | extra

    def wait_for(self, condition: Callable[[], bool], what: str | Callable[[], str], seconds: float) -> None:
        """Waits until something holds, or fails with what was waited for, and what Slurm says."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (
                f"{what if isinstance(what, str) else what()}\n{self.call('squeue', check=False)}\n"
                f"{(self.directory / 'daemons.log').read_text(encoding='utf-8', errors='replace')[-3000:]}"
            )
            time.sleep(0.3)

    def _processes(self) -> list[psutil.Process]:
        """All that jobs of this cluster run."""
        running = psutil.process_iter(["environ"])
        return [
            one
            for one in running
            if (one.info["environ"] or {}).get("SLURM_CONF") == str(self._config)
            and "SLURM_JOB_ID" in one.info["environ"]
        ]

    @property
    def _config(self) -> Path:
        return self.directory / "slurm.conf"

    def _daemon(self, *words: object) -> subprocess.Popen[bytes]:
        with (self.directory / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen([str(word) for word in words], stdout=log, stderr=log, env=self.environment())
        self._daemons.append(daemon)
        return daemon


def _free_ports(count: int) -> Sequence[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
