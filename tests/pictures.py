"""Whether a picture is one: a whole PNG file of the size that its header says, with something drawn on it."""

import base64
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

from matplotlib.image import imread

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check_png(picture: Path | bytes) -> None:
    """Check signature, header and checksum, that all of it can be read, and that it is not blank."""
    content = picture.read_bytes() if isinstance(picture, Path) else picture
    assert content.startswith(SIGNATURE)
    length, kind, width, height = struct.unpack(">I4sII", content[8:24])
    assert (length, kind) == (13, b"IHDR")
    assert struct.unpack(">I", content[29:33])[0] == zlib.crc32(content[12:29])
    assert content[-8:-4] == b"IEND"
    pixels = imread(BytesIO(content), format="png")
    assert pixels.shape[:2] == (height, width)
    assert min(width, height) >= 200
    assert pixels[..., :3].std() > 0.01


def check_page(page: Path) -> int:
    """Check the pictures inside a page; how many there are."""
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.read_text())
    for picture in found:
        check_png(base64.b64decode(picture))
    return len(found)
