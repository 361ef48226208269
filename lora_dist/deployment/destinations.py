"""Checks before anything is loaded that `predict` can write all its outputs."""

import os
from pathlib import Path

from lora_dist.errors import UserError
from lora_dist.settings.predict import Images, PredictSettings, format_of
from lora_dist.storage.writable import require_writable, writing


def require_destinations(settings: PredictSettings) -> None:
    """Checks all output paths of a prediction.

    Raises:
        UserError: lists the paths that exist, are not writable, or are inside another output.
    """
    merging, images = settings.merging, settings.images
    # In the order of writing.
    wanted = {
        "export_legacy_names": (merging.export_legacy_names, require_free_directory),
        "merge_to": (merging.merge_to, require_free_directory),
        "onnx": (settings.onnx_to_write, require_free_file),
        "explain": (images.explain, _require_directory),
        "output": (images.output, _require_parquet_file if _is_parquet(images) else _require_file),
        "grid": (images.grid, _require_file),
    }
    problems: list[str] = []
    before: dict[str, Path] = {}
    for flag, (name, check) in wanted.items():
        if not name:
            continue
        path = Path(name).resolve()
        try:
            check(Path(name), flag)
        except UserError as error:
            problems.append(str(error))
        else:
            problems += [
                f"--{flag} {name}: --{other} is written there first; choose another path"
                for other, earlier in before.items()
                if path == earlier or (path in earlier.parents and check is not _require_directory)
            ]
        before[flag] = path
    if problems:
        raise UserError("\n  ".join(["nothing was done, because these outputs cannot be written:", *problems]))


def require_free_directory(path: Path, flag: str) -> None:
    """Raises a `UserError` unless a directory can be created at `path`, or an empty one replaced."""
    with writing(path, flag):
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--{flag} {path} is not empty; choose another directory")
        if path.resolve() == Path.cwd() or path.is_mount():
            raise UserError(f"--{flag} {path}: this directory would be replaced; choose one inside it")
        require_writable(path.parent, f"--{flag}")


def require_free_file(path: Path, flag: str) -> None:
    """Raises a `UserError` unless a file can be created at `path`."""
    with writing(path, flag):
        if path.is_dir():
            raise UserError(f"--{flag} {path} is a directory; name a file, such as {path / 'model.onnx'}")
        if os.path.lexists(path):
            raise UserError(
                f"--{flag} {path} exists; choose another file, or run this one without --adapter and --model"
            )
        require_writable(path.parent, f"--{flag}")


def _require_directory(path: Path, flag: str) -> None:
    """The path may be an existing directory, which gets more files."""
    with writing(path, flag):
        if path.exists() and not path.is_dir():
            raise UserError(f"--{flag} {path} is not a directory; choose another path")
        require_writable(path, f"--{flag}")


def is_plain_file(output: str | None) -> bool:
    """Whether rows go to a file, rather than to the terminal, a pipe or a device."""
    return output is not None and (not Path(output).exists() or Path(output).is_file())


def _is_parquet(images: Images) -> bool:
    return format_of(images.output, images.format) == "parquet"


def _require_parquet_file(path: Path, flag: str) -> None:
    """As `_require_file`; also refuses a pipe or a device, which writing parquet would replace by a file."""
    _require_file(path, flag)
    if not is_plain_file(str(path)):
        raise UserError(f"--{flag} {path}: not a file, as parquet needs; use --format jsonl or csv")


def _require_file(path: Path, flag: str) -> None:
    """The path may be an existing file, which is overwritten, or a pipe."""
    with writing(path, flag):
        if path.is_dir():
            raise UserError(f"--{flag} {path} is a directory; choose a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"--{flag} {path}: no permission to write; choose another file")
        if not path.exists():
            require_writable(path.parent, f"--{flag}")
