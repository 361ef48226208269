"""A cache for `datasets` where its own, which may belong to somebody else, cannot be written."""

import errno
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from datasets import config

from lora_dist import waiting

logger = logging.getLogger(__name__)
T = TypeVar("T")


def with_writable_cache(load: Callable[[str | None], T]) -> T:
    """Returns what `load` returns for the cache of `datasets`, or for a private directory if it may not write there.

    `load` takes the directory, None for the cache of `datasets`, and is called again after an error of permissions.
    """
    try:
        return load(None)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        private = _private_directory()
        found = load(private)
        if waiting.is_local_main():
            logger.warning(
                "the cache %s cannot be used (%s: %s), so the data is cached in %s; HF_DATASETS_CACHE sets another "
                "directory",
                config.HF_DATASETS_CACHE,
                error.strerror,
                error.filename,
                private,
            )
        return found


def _private_directory() -> str:
    """A directory that the processes of this user share and others cannot write to."""
    directory = Path(tempfile.gettempdir()) / f"lora_dist-datasets-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat(follow_symlinks=False)
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or directory.is_symlink():
        return tempfile.mkdtemp(prefix="lora_dist-datasets-")
    return str(directory)
