"""What W&B wrote, read back from its own offline files."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    for content in _contents(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        yield record


def _contents(path: Path) -> Iterator[bytes]:
    """LevelDB's log format behind a header of 7 bytes (wandb 0.31 ships no reader).

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    content, offset, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while offset + 7 <= len(content):
        room = 32768 - offset % 32768
        if room < 7:
            offset += room
            continue
        length, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
        parts += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield parts
            parts = b""
