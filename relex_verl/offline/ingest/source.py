"""A checkpoint on disk as a source of shards, read while the shards before are worked on."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import TensorShard, whole

__all__ = ["CheckpointSource"]

# Bytes read before the files are mapped anew, so that their pages do not pile up in this process's memory.
RELEASE = 128 * 2**20
AHEAD = 256 * 2**20  # bytes of a file that are asked for before they are read
PIECE = 2**20  # at a time: Linux cuts a larger request down to what its device takes


class CheckpointSource:
    """One checkpoint as a `ShardSource`: whole tensors, one at a time, memory-mapped, read from disk ahead of their use."""

    def __init__(self, checkpoint: BaseCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.checkpoint, self.shapes = checkpoint, shapes

    def __iter__(self) -> Iterator[TensorShard]:
        checkpoint, mapped = self.checkpoint.reopened(), 0
        with ThreadPoolExecutor(1) as background:
            ahead = _ReadAhead(background)
            for name, shape in self.shapes.items():
                data = checkpoint.read(name).flatten()
                ahead.use(checkpoint.folder / checkpoint.entries[name].file, data.nbytes)
                mapped += data.nbytes
                yield TensorShard(name, shape, whole(shape), data)
                if mapped > RELEASE:
                    checkpoint, mapped = checkpoint.reopened(), 0


class _ReadAhead:
    """Asks the system for what comes next in a file, so that the disk works while we compute.

    Only a hint: files hold their tensors nearly in the order of their names, in which we read them. In a thread of its own,
    since the system takes the time to find memory for the pages before it lets the disk go.
    """

    def __init__(self, background: ThreadPoolExecutor) -> None:
        self._background = background
        self._used: dict[Path, int] = {}  # file -> bytes that were read
        self._asked: dict[Path, int] = {}

    def use(self, file: Path, size: int) -> None:
        """So many bytes of this file are being read."""
        self._used[file] = self._used.get(file, 0) + size
        asked, wanted = self._asked.get(file, 0), self._used[file] + AHEAD
        if wanted - asked < AHEAD // 2:
            return
        self._asked[file] = wanted
        self._background.submit(_ask, file, asked, wanted)


def _ask(file: Path, begin: int, end: int) -> None:
    with open(file, "rb") as stream:
        for at in range(begin, min(end, os.fstat(stream.fileno()).st_size), PIECE):
            os.posix_fadvise(stream.fileno(), at, PIECE, os.POSIX_FADV_WILLNEED)
