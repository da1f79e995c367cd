"""The byte floor of an observation: the bytes that must move for a row, moved by loops that do nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from relex_verl.pipeline.observer import Observer

__all__ = ["byte_floor", "read_both"]


def _read(tensor: torch.Tensor) -> None:
    whole = tensor.numel() * tensor.element_size() // 8 * 8
    tensor.view(torch.uint8)[:whole].view(torch.int64).sum()  # as words: reading, not adding, is to cost


def _rewrite(tensor: torch.Tensor) -> None:
    """Read and write, without a change."""
    tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).bitwise_xor_(0)


def read_both(observer: Observer, weights: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Reads the new and the old shard."""

    def move() -> None:
        for tensor in (*weights.values(), *(one.state for one in observer.held.values())):
            _read(tensor)

    return move


def byte_floor(observer: Observer, weights: dict[str, torch.Tensor], folder: Path) -> Callable[[], None]:
    """Moves what the row just observed had to move.

    Rows: reads the new shard, the state and the rows before, writes the row to memory and to a file, and the state where it
    changed. A sketch: reads the new shard and theta_0, reads and writes the moments; it has no file.
    """
    held = [one.state for one in observer.held.values()]
    if not observer.kind.keeps_rows:
        moments = [part.value for i in range(len(held)) for part in observer.collector.parts(i)]

        def move_moments() -> None:
            for tensor in (*weights.values(), *held):
                _read(tensor)
            for moment in moments:
                _rewrite(moment)

        return move_moments
    *before, last = (row.arrays for row in observer.collector.packed)
    size = sum(array.nbytes for array in last.values())

    def move() -> None:
        for tensor in weights.values():
            _read(tensor)
        for state in held:
            (_rewrite if observer.kind.wants_master else _read)(state)
        for row in before:
            for array in row.values():
                if array.ndim == 1:
                    _read(array)
        fresh = torch.from_numpy(np.empty(size, np.uint8))
        fresh.fill_(1)
        with open(folder / "floor", "wb", buffering=0) as stream:
            stream.write(fresh.numpy().data)

    return move
