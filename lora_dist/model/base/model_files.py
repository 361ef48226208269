"""Finds the files of a model, and recognizes what is taken for them: the directory of a run, pointers of Git LFS."""

from pathlib import Path

from lora_dist.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_POINTER = b"version https://git-lfs"


def weight_files(directory: Path) -> list[Path]:
    """Returns the files of weights of a whole model."""
    return [*directory.glob("model*.safetensors"), *directory.glob("pytorch_model*")]


def find_result(directory: Path) -> Path | None:
    """Returns the adapter or model that a run wrote, if the directory is that of the run or of its checkpoints."""
    run = directory.parent if directory.name == "checkpoints" else directory
    results = ((run / "adapter", ADAPTER_CONFIG), (run / "model", "config.json"))
    return next((result for result, file in results if (result / file).is_file()), None)


def result_hint(directory: Path) -> str:
    """Returns a hint for an error message if the directory is that of a run, else an empty string."""
    result = find_result(directory)
    what = (
        "the directory of a run's checkpoints" if directory.name == "checkpoints" else "the output directory of a run"
    )
    return "" if result is None else f". It is {what}; pass its result, {result}"


def require_content(file: Path) -> None:
    """Raises a `UserError` if a file is what `git clone` leaves of a large file where Git LFS is not installed."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file} is a pointer of Git LFS, and not the file itself: run `git lfs pull` beside it")
