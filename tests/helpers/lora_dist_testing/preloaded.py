"""A process that has loaded the libraries, and forks into commands: each is spared the seconds that imports take.

`lora_dist` itself is not loaded before. What differs from a Python of its own: the libraries have read their variables
before, and all processes have one seed of hashes; ranks fork from their launcher and call `main` of their module.
"""

import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

LAUNCHER = "accelerate.commands.launch"
LIBRARIES = (
    "accelerate",
    LAUNCHER,
    "datasets",
    "evaluate",
    "peft",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "torchvision",
    "transformers",
    "transformers.models.auto.modeling_auto",
)
READ_BEFORE = ("HF_", "HOME", "OMP_", "PYTHON", "XDG_")
"""Beginnings of the names of variables that libraries read when they are loaded."""


def read_before(environment: dict[str, str]) -> dict[str, str]:
    """The variables that the process has to have from its start."""
    return {name: value for name, value in environment.items() if name.startswith(READ_BEFORE)}


class Preloaded:
    """The process, which starts when it is first needed and ends with this one.

    Attributes:
        environment: its variables.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, words: list[str], environment: dict[str, str], cwd: Path | None, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Runs `python -m WORDS` in a fork of the process."""
        process = self._process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        with tempfile.TemporaryDirectory() as said:
            request = {"words": words, "environment": environment, "cwd": str(cwd or Path.cwd()), "said": said}
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                if not select.select([process.stdout], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(words, timeout)
                code = int(process.stdout.readline())
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                self._process = None
                raise
            out, err = (Path(said, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(words, code, out, err)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-uP", __file__],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )


def _serve() -> None:
    for name in LIBRARIES:
        import_module(name)
    # Others than those that the forks would have in common.
    os.register_at_fork(after_in_child=random.seed)
    os.register_at_fork(after_in_child=import_module("numpy").random.seed)
    while line := sys.stdin.buffer.raw.readline():
        child = os.fork()
        if not child:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(words: list[str], environment: dict[str, str], cwd: str, said: str) -> None:
    os.environ.clear()
    # GLIBC_TUNABLES: the commands do not execute themselves anew to have huge pages.
    os.environ.update({"GLIBC_TUNABLES": ""} | environment)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        os.dup2(os.open(os.path.join(said, path), mode | os.O_CREAT), number)
    module, *arguments = words
    if module == LAUNCHER:
        _launch(arguments)
    else:
        sys.argv = words
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _launch(words: list[str]) -> None:
    """`accelerate launch`, with ranks that are forks."""
    launcher = import_module(LAUNCHER)
    given = launcher.launch_command_parser().parse_args(words)
    given.run_path, given.start_method = True, "fork"
    given.training_script_args = [given.training_script, *given.training_script_args]
    given.training_script, given.module = __file__, False
    launcher.launch_command(given)


def _rank(module: str, *words: str) -> None:
    """One that succeeds returns, as its launcher expects; one that fails ends as the command does."""
    lifetime = import_module("lora_dist.processes.lifetime")
    try:
        import_module(module).main(list(words))
    except BaseException as error:
        lifetime.end_process(lifetime._exit_code(error))


if __name__ == "__main__":
    if sys.argv[1:]:
        _rank(*sys.argv[1:])
    else:
        _serve()
