"""The embedded base model and data of the offline demo, named `demo:vit` and `demo:digits/…` in settings.

Imports nothing heavy: the settings ask here whether a name is packaged before torch is loaded.
"""

import os
from pathlib import Path

PREFIX = "demo:"


def is_packaged(name: str) -> bool:
    """Whether `name` stands for something this package brings along."""
    return name.startswith(PREFIX)


def photographs() -> list[str]:
    """The packaged photographs, as files; `photos/README.md` says whose they are."""
    return [str(path) for path in sorted((Path(__file__).parent / "photos").glob("*.jpg"))]


def local_path(name: str) -> str:
    """The directory that a name of the demo stands for; any other name is returned unchanged.

    The digits are written out as PNG files the first time they are asked for, below `$LORA_DIST_CACHE`
    (default `~/.cache/lora_dist`).

    Raises:
        UserError: the demo has nothing of that name.
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
        digits.write(root)
        if inside and (root / inside).is_dir():
            return str(root / inside)
    raise UserError(f"{name}: the demo has {PREFIX}vit, {PREFIX}digits/train and {PREFIX}digits/validation")
