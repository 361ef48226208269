"""Files to upload, good and bad, and the head of a request with them."""

import io
import struct
import zlib

from lora_dist_testing.tiny import make_image
from lora_dist_testing.web import BOUNDARY

HEAD = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"


def encoded(format_: str = "PNG", size: tuple[int, int] = (40, 32)) -> bytes:
    """An image file."""
    file = io.BytesIO()
    make_image(0, 0, size).save(file, format_)
    return file.getvalue()


def png_of(width: int, height: int, rows: bytes = b"") -> bytes:
    """A PNG whose header says any size, whatever pixels follow."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
