"""How much room a disk has, and sizes for people."""

import shutil
from pathlib import Path

from lora_dist.storage.writable import standing

SAFETY = 1.1
"""Room is asked for with this margin, for what is small beside it: headers, curves, pictures."""


def free_bytes(root: Path) -> int:
    """Room on the disk of a directory, which need not be there yet."""
    return shutil.disk_usage(standing(root)).free


def readable(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
