"""Free disk space, and sizes as text.

The modules that write files handle a full disk: checkpoints in `training/saving/checkpointer.py`, the result in
`training/saving/result_writer.py`, curves in `training/reporting/curve_files.py`, all others in `storage/writable.py`.
"""

import shutil
from pathlib import Path

from lora_dist.storage.writable import nearest_existing

SAFETY = 1.1
"""Factor on required disk space, for headers, logs and images."""


def free_bytes(root: Path) -> int:
    """Free bytes on the disk of a directory, which need not exist."""
    return shutil.disk_usage(nearest_existing(root)).free


def readable(size: float) -> str:
    """Formats a number of bytes, e.g. `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
