"""Files that are whole or not there: written to a temporary name, then renamed; and what safetensors files begin with."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file

from relex_verl.trajectory.checksum import KEY, checksum

__all__ = [
    "copy_whole",
    "header_bytes",
    "into",
    "is_full",
    "reserve",
    "save_tensors",
    "stream_tensors",
    "temporary_for",
    "write_json",
    "write_text",
]

# No space, a user's share of it is used up, or a file may not grow further.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# How safetensors spells what is kept of an optimizer.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

# What this user keeps from others; there is no way to ask without setting it.
UMASK = os.umask(0o077)
os.umask(UMASK)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full; libraries and subprocesses wrap the system's error in their own."""
    return _full(error) is not None


def _full(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL else None
    return next((number for number in FULL if os.strerror(number) in str(error)), None)


@contextmanager
def into(path: Path) -> Iterator[None]:
    """While a file is written: of a full disk the system says which number, and not always where."""
    try:
        yield
    except Exception as error:
        number = _full(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def temporary_for(path: Path, process: str = "") -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends; an error, such as a full disk, keeps no half of it."""
    temporary = path.with_name(f".{path.name}.{process}tmp")
    try:
        with into(path):
            yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name, then rename: readers see the old file or the new one."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write text to a temporary name, then rename."""
    with temporary_for(path, f"{os.getpid()}.") as temporary:
        temporary.write_text(content)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file's content, not its mode: ours follow the umask."""
    with temporary_for(path) as temporary:
        shutil.copyfile(source, temporary)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, with its checksum, to a temporary name, then rename.

    Args:
        path: its name.
        tensors: what it holds.
    """
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with temporary_for(path) as temporary:
        save_file(whole, temporary, {KEY: checksum(whole)})  # a second key would come in any order
        temporary.chmod(0o666 & ~UMASK)  # safetensors 0.8 lets nobody else read what it writes


def stream_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Like `save_tensors`, with a copy of one tensor at a time in host memory; the others stay on their device.

    Raises:
        OSError: no space left; nothing is kept of it, and an old file of that name stays.
    """
    header, size = {}, 0
    for name, tensor in tensors.items():
        end = size + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [size, end]}
        size = end
    start = header_bytes(header)
    with temporary_for(path) as temporary, open(temporary, "wb") as stream:
        stream.write(start)
        stream.flush()
        reserve(stream, len(start) + size)
        stream.seek(len(start))
        for tensor in tensors.values():
            stream.write(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())


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
