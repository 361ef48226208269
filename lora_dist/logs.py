"""Sets up logging: this package's messages from one process, and only errors from the libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from PIL import Image
from tqdm import tqdm


class AboveBars(logging.StreamHandler):
    """Writes messages to a stream, on lines of their own above the progress bars that this process shows there."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._process = os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        try:
            self._write(record)
        except Exception:
            self.handleError(record)

    def _write(self, record: logging.LogRecord) -> None:
        if not self.stream.isatty():
            super().emit(record)
            return
        if os.getpid() != self._process:
            # The bars of a forked process are copies. The process that shows them draws them anew, below the message.
            if self._bars():
                self.stream.write("\r\x1b[K")
            super().emit(record)
            return
        with tqdm.get_lock():
            bars = self._bars()
            for bar in bars:
                bar.clear(nolock=True)
            super().emit(record)
            for bar in bars:
                bar.refresh(nolock=True)

    def _bars(self) -> list[tqdm]:
        """The bars that have been drawn."""
        return [bar for bar in getattr(tqdm, "_instances", ()) if self._shows(bar)]

    def _shows(self, bar: tqdm) -> bool:
        # Another thread may be making the bar.
        if not hasattr(bar, "start_t") or bar.disable or bar.fp != self.stream:
            return False
        return bar.delay == 0 or bar.last_print_n > bar.initial


def set_up_logs(is_main: bool) -> None:
    """Logs this package to stderr, on the first process, and quietens the libraries.

    Args:
        is_main: whether this is the first process; the others log errors alone.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[AboveBars(sys.stderr)], force=True)
    logging.getLogger("lora_dist").setLevel(logging.INFO if is_main else logging.ERROR)
    # DeepSpeed calls functions that torch is about to rename.
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    ignore_warnings_of_pillow()
    if not torch.accelerator.is_available():
        # Otherwise deepspeed, if installed, prints that there is no accelerator whenever a library looks for deepspeed.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import datasets
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # It would log upload URLs, whose signatures grant access like a token.
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def ignore_warnings_of_pillow() -> None:
    """Ignores Pillow's warnings, which do not name the image, in this process and in those that it forks."""
    # An image with damaged metadata that cannot be read is named by an error.
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    # Pillow warns from half of the limit of pixels on, at which it refuses an image.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers from printing while the block loads a model, then restores the caller's settings.

    It would show progress bars, and report weights as newly initialised that an adapter brings.
    """
    import transformers.utils.logging as transformers_logging

    verbosity, has_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
