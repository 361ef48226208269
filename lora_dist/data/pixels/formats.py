"""Formats of image files: registers HEIC where pillow-heif is installed, and recognizes files by their content."""

import codecs
import stat
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageFile

NOT_DECODED = ("EPS", "MPEG", "WMF")
"""Formats that Pillow opens, but decodes only with another program or not at all."""
HEIC_SUFFIXES = (".heic", ".heics", ".heif", ".heifs", ".hif")
HEIC_ADVICE = "pip install 'lora_dist[heif]' reads HEIC images"
START_BYTES = 64
"""Bytes at the start of a file that tell what it is."""
_SHOWN_CHARACTERS = 40
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()


def decoded_formats() -> set[str]:
    """Names of the formats that Pillow and its installed plug-ins decode."""
    Image.init()
    # An MPO file begins with a JPEG image, and its opener is that of JPEG.
    return {"MPO"} | {
        name
        for name, (opener, _) in Image.OPEN.items()
        if name not in NOT_DECODED and not (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile))
    }


def unidentified(start: bytes) -> str:
    """Describes a file that Pillow does not read, from its first `START_BYTES`."""
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return f"the content is a HEIC image; {HEIC_ADVICE}"
    with suppress(UnicodeDecodeError):
        # The start may end within a character.
        text = " ".join(codecs.getincrementaldecoder("utf-8-sig")().decode(start).split())
        if text.isprintable():
            return f"the content is text, not an image: {text[:_SHOWN_CHARACTERS]}"
    return "not an image of a known format"


def has_image_content(path: str) -> bool:
    """Whether the content of a file, not its name, says that it is an image that Pillow decodes."""
    try:
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return False
        with Image.open(path) as image:
            return image.format in decoded_formats()
    except Image.DecompressionBombError:
        return True
    except Exception:
        # Pillow's openers raise whatever a damaged file leads them to.
        return False
