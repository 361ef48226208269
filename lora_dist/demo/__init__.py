"""The packaged base model and data of the offline demo, named `demo:vit` and `demo:digits/…` in settings.

Imports nothing heavy: the settings call it before torch is loaded.
"""

import os
from pathlib import Path

PREFIX = "demo:"


def is_packaged(name: str) -> bool:
    """Whether `name` is a model or data set of this package."""
    return name.startswith(PREFIX)


def photographs() -> list[str]:
    """Paths of the packaged photographs; `photos/README.md` lists their authors."""
    return [str(path) for path in sorted((Path(__file__).parent / "photos").glob("*.jpg"))]


def local_path(name: str) -> str:
    """The directory of a model or data set of the demo; other names are returned unchanged.

    The first use of the digits writes them as PNG files to `$LORA_DIST_CACHE` (default `~/.cache/lora_dist`). Raises
    `UserError` for a name that the demo does not have, and if the digits cannot be written.
    """
    from lora_dist.errors import UserError

    if not is_packaged(name):
        return name
    kind, _, inside = name.removeprefix(PREFIX).partition("/")
    if kind in ("vit", "vit_config") and not inside:
        return str(Path(__file__).parent / kind)
    if kind == "digits":
        from lora_dist.demo import digits

        cache = Path(os.environ.get("LORA_DIST_CACHE", Path.home() / ".cache" / "lora_dist"))
        root = cache / "digits"
        try:
            digits.write(root)
        except OSError as error:
            raise UserError(
                f"{name}: cannot write the digits to {root} ({error.strerror}); LORA_DIST_CACHE sets another directory"
            ) from error
        if inside and (root / inside).is_dir():
            return str(root / inside)
    raise UserError(f"{name}: the demo has {PREFIX}vit, {PREFIX}digits/train and {PREFIX}digits/validation")
