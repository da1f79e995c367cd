"""Whether a file's arrays are those that were written: a CRC-32, some 7 GB a second of a processor's time (2026-11-28).

Against a disk that forgets or a copy that broke off. It is no protection from somebody who means to deceive.
"""

import zlib
from collections.abc import Mapping

import torch

__all__ = ["KEY", "checksum"]

# Where a safetensors file says it, among its metadata.
KEY = "relex.crc32"


def checksum(arrays: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 over names, types, shapes and bytes of arrays, in the order of their names, as eight hexadecimal digits."""
    crc = 0
    for name in sorted(arrays):
        array = arrays[name].detach().contiguous()
        crc = zlib.crc32(f"{name} {array.dtype} {list(array.shape)}\n".encode(), crc)
        crc = zlib.crc32(array.view(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
