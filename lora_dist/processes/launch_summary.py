"""Why a process ended, for the summary in which the launcher of torch lists the processes that failed.

The launcher prints the summary, and a long traceback of its own, below all messages of its processes. If a process
writes no reason, the summary only refers to a page about tracebacks.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path


def write_reason(message: str) -> None:
    """Writes why the process ended to TORCHELASTIC_ERROR_FILE, which the launcher reads, if it is set."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    # The format of `torch.distributed.elastic.multiprocessing.errors.ErrorHandler`, which imports torch.
    content = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": content}), encoding="utf-8")
