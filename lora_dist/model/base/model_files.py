"""Recognizes what is taken for the files of a model: the directory of a run, and pointers of Git LFS."""

from pathlib import Path

from lora_dist.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_POINTER = b"version https://git-lfs"


def result_of_run(directory: Path) -> str:
    """Returns a hint for an error message if the directory is that of a run, else an empty string."""
    run, what = directory, "the output directory of a run"
    if directory.name == "checkpoints":
        run, what = directory.parent, "the directory of a run's checkpoints"
    for inside, file in ((run / "adapter", ADAPTER_CONFIG), (run / "model", "config.json")):
        if (inside / file).is_file():
            return f". It is {what}; pass its result, {inside}"
    return ""


def require_content(file: Path) -> None:
    """Raises a `UserError` if a file is what `git clone` leaves of a large file where Git LFS is not installed."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a pointer of Git LFS, and not the file itself: run `git lfs pull` beside it")
