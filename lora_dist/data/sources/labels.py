"""Class names that a person can tell apart."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

from lora_dist.errors import UserError

ZERO_WIDTH = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))


def visible_name(name: str) -> str:
    """A class name without differences that cannot be seen: spaces, zero-width characters, composition of accents."""
    return " ".join(unicodedata.normalize("NFC", name.translate(ZERO_WIDTH)).split())


def require_distinct(names: Iterable[str]) -> None:
    """Raises `UserError` if two class names look the same."""
    alike = defaultdict(set)
    for name in names:
        alike[visible_name(name)].add(name)
    if same := [sorted(group) for group in alike.values() if len(group) > 1]:
        listed = "; ".join(" and ".join(map(ascii, group)) for group in same[:10])
        raise UserError(
            f"class names that look the same but differ in spaces or in how accents are written: {listed}. "
            f"Give each class one name."
        )
