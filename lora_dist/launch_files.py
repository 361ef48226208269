"""Lists the launch files for `accelerate launch`, or copies them: `python -m lora_dist.launch_files [DIRECTORY]`."""

import argparse
import shutil
from pathlib import Path

from lora_dist.errors import UserError
from lora_dist.processes.lifetime import exit_on_user_error, run_command
from lora_dist.settings.cli import argv_or
from lora_dist.storage.writable import require_writable

_PACKAGE = Path(__file__).parent
# A wheel has them in the package, a checkout next to it.
LAUNCH_FILES = next(path for path in (_PACKAGE, _PACKAGE.parent) if (path / "accelerate_configs").is_dir())


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Lists the launch files with their descriptions, or copies them to a directory.

    Raises:
        UserError: The directory is not writable or contains one of the files.
    """
    parser = argparse.ArgumentParser(prog="lora_dist.launch_files", description="List or copy the launch files.")
    parser.add_argument("directory", nargs="?", type=Path, help="Directory to copy the files to. Default: list them.")
    directory = parser.parse_args(argv_or(argv)).directory
    files = sorted((LAUNCH_FILES / "accelerate_configs").glob("*.yaml"))
    if directory is None:
        for file in files:
            print(f"{file}  {file.read_text(encoding='utf-8').splitlines()[0]}")
        return
    require_writable(directory, "DIRECTORY")
    existing = [file.name for file in files if (directory / file.name).exists()]
    if existing:
        raise UserError(f"{directory} already contains {', '.join(existing)}; use another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, directory)
    print(f"copied {len(files)} launch files: accelerate launch --config_file {directory / 'single.yaml'} ...")


if __name__ == "__main__":
    run_command(main)
