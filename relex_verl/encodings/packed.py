"""One step of a rank: the increments of all its tensors end to end in a few flat arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import safe_open

__all__ = ["PackedStep", "StoredStep"]

Increment = TypeVar("Increment")
# Bytes read from a step's file before it is mapped anew, so that its pages do not pile up in the memory of the process.
RELEASE = 16 * 2**20


class PackedStep(Generic[Increment]):
    """A dozen arrays instead of several for each of 10,000 tensors: small headers on disk, few objects in memory.

    Attributes:
        arrays: each field of the increment's type, concatenated over the tensors; `sizes` (L, fields) int64 says how
            many elements of each are a tensor's; `gram_row` (L, t) float64 is this rank's part of the new row of H.
    """

    def __init__(self, kind: type[Increment], arrays: Mapping[str, torch.Tensor]) -> None:
        self.kind, self.arrays = kind, dict(arrays)
        self._fields = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        ends = self.arrays["sizes"].cumsum(0)
        self._bounds = torch.cat([ends.new_zeros(1, len(self._fields)), ends]).tolist()

    @classmethod
    def pack(cls, kind: type[Any], increments: Sequence[Increment], gram_row: torch.Tensor) -> "PackedStep[Increment]":
        """Put the increments of a step end to end.

        Args:
            kind: the dataclass of the increments.
            increments: one a tensor, at least one.
            gram_row: (L, t) float64.
        """
        names = [field.name for field in fields(kind)]
        arrays = {name: torch.cat([getattr(one, name) for one in increments]) for name in names}
        sizes = [[getattr(one, name).numel() for name in names] for one in increments]
        return cls(kind, {**arrays, "sizes": torch.tensor(sizes, dtype=torch.int64), "gram_row": gram_row})

    def increment(self, tensor: int) -> Increment:
        """The increment of one tensor: views, no copy."""
        begin, end = self._bounds[tensor], self._bounds[tensor + 1]
        return self.kind(*(self.arrays[name][begin[i] : end[i]] for i, name in enumerate(self._fields)))

    @property
    def nbytes(self) -> int:
        """Bytes in memory, and on disk but for the header."""
        return sum(array.nbytes for array in self.arrays.values())


class StoredStep(Generic[Increment]):
    """A step that stays in its file: like `PackedStep`, with only the pages of the last few increments in memory."""

    def __init__(self, kind: type[Increment], path: Path) -> None:
        self.kind, self.path = kind, path
        self._mapped: PackedStep[Increment] = self._map()
        self._read = 0
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        item = torch.tensor([self._mapped.arrays[name].itemsize for name in names])
        self._bytes: list[int] = (self._mapped.arrays["sizes"] * item).sum(1).tolist()
        self.nbytes = self._mapped.nbytes

    def _map(self) -> PackedStep[Increment]:
        with safe_open(self.path, framework="pt") as handle:
            return PackedStep(self.kind, {name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118

    def increment(self, tensor: int) -> Increment:
        """The increment of one tensor: views of the file."""
        if self._read > RELEASE:
            self._mapped, self._read = self._map(), 0
        increment = self._mapped.increment(tensor)
        self._read += self._bytes[tensor]
        return increment
