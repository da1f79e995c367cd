"""Files that are whole or not there: written to a temporary name, then renamed; and what safetensors files begin with."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file

__all__ = ["header_bytes", "reserve", "save_tensors", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file to a temporary name, then rename; a full disk keeps no half of it.

    Args:
        path: its name.
        tensors: what it holds.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def reserve(stream: BinaryIO, size: int) -> None:
    """Take the space now: a full disk is an OSError here, but kills the process when a mapped page is written."""
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise OSError(error.errno, error.strerror, stream.name) from error
        os.ftruncate(stream.fileno(), size)


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """The header of a safetensors file: its length, and JSON that says what lies where."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data that follows is aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text
