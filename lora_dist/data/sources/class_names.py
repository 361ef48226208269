"""Class names that a person can tell apart."""

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable

from lora_dist.errors import UserError

logger = logging.getLogger(__name__)

ZERO_WIDTH = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))


def visible_name(name: str) -> str:
    """Normalizes spaces, zero-width characters and accents (NFC), so that names that look the same are equal."""
    return " ".join(unicodedata.normalize("NFC", name.translate(ZERO_WIDTH)).split())


def require_distinct(names: Iterable[str]) -> None:
    """Raises `UserError` if two class names look the same, or are the same whole number, as 1 and 1.0."""
    if same := _groups(names, lambda name: re.sub(r"^(\d+)\.0+$", r"\1", visible_name(name))):
        raise UserError(
            f"class names that look the same but differ in spaces, in how accents are written or in decimals: {same}. "
            f"Give each class one name."
        )


def warn_of_similar(names: Iterable[str]) -> None:
    """Warns of class names that differ only in upper and lower case, or as 7 and 007."""
    if same := _groups(names, lambda name: re.sub(r"^0+(?=\d+$)", "", name.casefold())):
        logger.warning("classes whose names differ only in upper and lower case or in leading zeros: %s", same)


def _groups(names: Iterable[str], key: Callable[[str], str]) -> str:
    """Names that have the same key, as text; empty if all differ."""
    alike = defaultdict(set)
    for name in names:
        alike[key(name)].add(name)
    groups = [sorted(group) for group in alike.values() if len(group) > 1]
    return "; ".join(" and ".join(map(ascii, group)) for group in groups[:10])
