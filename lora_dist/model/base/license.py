"""The license of a base model, from the metadata of its model card."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load
from transformers.utils import cached_file

from lora_dist import demo
from lora_dist.errors import first_line

logger = logging.getLogger(__name__)

_KEYS = ("license", "license_name", "license_link")
_OPEN = {
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"),
    *("bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0"),
    *("cdla-permissive-1.0", "cdla-permissive-2.0", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gpl"),
    *(
        "gpl-2.0",
        "gpl-3.0",
        "isc",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "mit",
        "mpl-2.0",
        "ms-pl",
        "ncsa",
        "osl-3.0",
        "pddl",
    ),
    *("postgresql", "unlicense", "wtfpl", "zlib"),
}
"""Identifiers of the Hub whose licenses restrict no field of use."""


@dataclass(frozen=True)
class License:
    """The license of a base model.

    Attributes:
        base: name or path of the base model.
        metadata: `license`, `license_name` and `license_link`, as the Hub's model cards have them.
    """

    base: str
    metadata: dict[str, Any]

    def section(self) -> list[str]:
        """Returns the lines of a model card that name the license, with a warning if it may restrict use."""
        license_, name, link = (self.metadata.get(key) for key in _KEYS)
        named = name or (", ".join(map(str, license_)) if isinstance(license_, list) else license_)
        text = f"The base model `{self.base}` has the license {f'[{named}]({link})' if link else named}."
        identifiers = license_ if isinstance(license_, list) else [license_]
        if not all(str(identifier).lower() in _OPEN for identifier in identifiers):
            text += " **It may restrict how this model is used and shared**, for example commercially: read it first."
        return ["## License", "", text, ""]


def license_of(base: str, revision: str | None, is_on_hub: bool) -> License | None:
    """Returns the license that the model card of a base names; None if it has no card or names none.

    Args:
        base: name on the Hub, or a directory.
        revision: commit on the Hub.
        is_on_hub: `base` is a name on the Hub.
    """
    try:
        card = cached_file(
            demo.local_path(base),
            "README.md",
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        metadata = (metadata_load(Path(card)) or {}) if card else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("cannot read the license in the model card of %s: %s", base, first_line(error))
        return None
    found = {key: metadata[key] for key in _KEYS if metadata.get(key)}
    if "license" not in found:
        return None
    link = str(found.get("license_link", ""))
    if link and "://" not in link:
        # A file of the base's repository.
        found.pop("license_link")
        if is_on_hub:
            found["license_link"] = f"https://huggingface.co/{base}/blob/{revision or 'main'}/{link}"
    return License(base, found)
