"""Faults for a training that runs in another process: exceptions in its main thread, and how its workers start."""

from pathlib import Path

_SITE = """
import ctypes, multiprocessing, os, sys, threading, time
from pathlib import Path

words = sys.orig_argv
module = words[words.index("-m") + 1] if "-m" in words else None

def fail(main):
    file = Path(__file__).with_name("fault")
    while not file.exists():
        time.sleep(0.02)
    rank, source = file.read_text().split(" ", 1)
    if os.environ.get("RANK", "0") == rank:
        fault = eval(source)
        if callable(fault) and not isinstance(fault, type):
            fault()
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(fault))

if module == "lora_dist.train":
    if os.environ.get("START_METHOD"):
        multiprocessing.set_start_method(os.environ["START_METHOD"])
    threading.Thread(target=fail, args=(threading.get_ident(),), daemon=True).start()
"""


class Faults:
    """A directory for PYTHONPATH that lets faults into `lora_dist.train`, and into nothing else."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
        self._directory = directory

    def environment(self, start_method: str) -> dict[str, str]:
        """Variables for a launch whose workers start by this method."""
        return {"PYTHONPATH": str(self._directory), "START_METHOD": start_method}

    def strike(self, fault: str, rank: int = 0) -> None:
        """Raises an exception, named by its class, in the main thread of a rank."""
        aside = self._directory / "aside"
        aside.write_text(f"{rank} {fault}", encoding="utf-8")
        aside.rename(self._directory / "fault")
