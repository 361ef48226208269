"""The memory of commands on a CPU: which commands start over for huge pages, what that gives, and when they do not."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lora_dist_testing.launching import command, environment

from lora_dist.processes.huge_pages import environment_before

SCRIPT = """
import os, resource, sys
from pathlib import Path
from lora_dist.processes import huge_pages

{before}
huge_pages.restart_with_huge_pages()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * size for size in (2**26, 2**23, 2**23, 2**20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
faults()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), faults(), *sys.argv[1:], sep="|")
"""
NO_GPU = "huge_pages.GPU_DRIVERS = []"
A_GPU = "huge_pages.GPU_DRIVERS = [Path('/dev/null')]"


def _without_tunables(**variables: str) -> dict[str, str]:
    set_here = ("GLIBC_TUNABLES", "LORA_DIST_ON_HUGE_PAGES")
    return {name: value for name, value in environment().items() if name not in set_here} | variables


def _run(before: str, **variables: str) -> tuple[str, int]:
    """`GLIBC_TUNABLES` as the script has it in the end, and page faults for 81 MiB that have been in use before."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(before=before), "--flag", "two words"],
        env=_without_tunables(**variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    pid, tunables, faults, *arguments = output.strip().split("|")
    assert pid == str(process.pid)
    assert arguments == ["--flag", "two words"]
    return tunables, int(faults)


def test_what_is_free_stays_with_a_command_that_started_over_as_the_same_process() -> None:
    tunables, faults = _run(NO_GPU)
    assert "glibc.malloc.hugetlb=1" in tunables
    assert faults < 100


def test_a_command_starts_over_only_once() -> None:
    """Also where something takes away what it was started over with."""
    assert _run(NO_GPU + "\nos.environ.pop('GLIBC_TUNABLES', None)")[0] == "None"


def test_what_is_compared_with_it_runs_as_it_was_started() -> None:
    added = {"GLIBC_TUNABLES": _run(NO_GPU)[0], "LORA_DIST_ON_HUGE_PAGES": "1"}
    assert environment_before({"A": "b", **added}) == {"A": "b"}
    by_the_user = {"A": "b", "GLIBC_TUNABLES": added["GLIBC_TUNABLES"]}
    assert environment_before(by_the_user) == by_the_user


@pytest.mark.parametrize("value", ["", "glibc.malloc.check=0"])
def test_what_the_user_says_of_memory_stands(value: str) -> None:
    assert _run(NO_GPU, GLIBC_TUNABLES=value)[0] == value
    assert environment_before({"GLIBC_TUNABLES": value}) == {"GLIBC_TUNABLES": value}


def test_nothing_is_changed_where_a_gpu_computes() -> None:
    assert _run(A_GPU)[0] == "None"
    assert "hugetlb=1" in _run(A_GPU, ACCELERATE_USE_CPU="true")[0]


def test_a_debugger_is_not_left() -> None:
    assert _run(NO_GPU + "\nsys.settrace(lambda *_: None)")[0] == "None"


@pytest.mark.parametrize(
    ("module", "arguments", "moves"),
    [
        ("lora_dist.train", ["--config", "demo"], True),
        ("lora_dist.predict", ["--model", "demo:vit", "--images", "demo:digits/validation"], True),
        ("lora_dist.bench", ["--config", "demo"], True),
        ("lora_dist.bench.compare", ["ours", "--config", "demo"], True),
        ("lora_dist.bench.compare", ["trainer", "--config", "demo"], False),
    ],
)
def test_which_commands_compute_on_huge_pages(module: str, arguments: list[str], moves: bool, tmp_path: Path) -> None:
    """torch is loaded after a command has started over, or has not."""
    process = psutil.Popen(
        command(module, arguments),
        env=_without_tunables(ACCELERATE_USE_CPU="true"),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not any("libtorch_cpu" in part.path for part in process.memory_maps()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        assert ("hugetlb=1" in process.environ().get("GLIBC_TUNABLES", "")) == moves
    finally:
        process.kill()
        process.wait()
