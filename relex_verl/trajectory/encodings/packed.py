"""One step of a rank: the increments of all its tensors end to end in a few flat arrays."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from safetensors import safe_open

__all__ = ["PackedStep", "Packing", "Row", "StoredStep"]

Increment = TypeVar("Increment")
# Bytes read from a step's file before it is mapped anew, so that its pages do not pile up in the memory of the process.
RELEASE = 16 * 2**20


def empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """(numel,) on the host, never written; by way of numpy, which asks the system for large pages: fewer faults."""
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(np.empty(numel * dtype.itemsize, np.uint8)).view(dtype)


def copy_over(there: torch.Tensor, array: torch.Tensor) -> None:
    """Copy a flat array on the host by this thread alone: for torch's others to come and go takes longer."""
    if array.numel():
        np.copyto(there.view(torch.uint8).numpy(), array.contiguous().view(torch.uint8).numpy())


class PackedStep(Generic[Increment]):
    """A dozen arrays instead of several for each of 10,000 tensors: small headers on disk, few objects in memory.

    Attributes:
        arrays: each field of the increment's type, concatenated over the tensors; `sizes` (L, fields) int64 says how
            many elements of each are a tensor's; `gram_row` (L, t) float64 is this rank's part of the new row of H.
    """

    def __init__(self, kind: type[Increment], arrays: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError where the arrays are not as long as `sizes` says: kernels go by their addresses."""
        self.kind, self.arrays = kind, dict(arrays)
        self._fields = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        sizes = self.arrays["sizes"]
        lengths = torch.tensor([self.arrays[name].numel() for name in self._fields])
        if (
            sizes.dtype != torch.int64
            or sizes.shape[1:] != lengths.shape
            or not bool(((sizes >= 0) & (sizes <= lengths)).all() and (sizes.sum(0) == lengths).all())
        ):
            raise ValueError("its arrays are not as long as it says")
        ends = sizes.cumsum(0)
        self.bounds = torch.cat([ends.new_zeros(1, len(self._fields)), ends]).numpy()

    @classmethod
    def pack(cls, kind: type[Any], increments: Iterable[Increment], gram_row: torch.Tensor) -> "PackedStep[Increment]":
        """Put the increments of a step end to end.

        Args:
            kind: the dataclass of the increments.
            increments: one a tensor.
            gram_row: (L, t) float64.
        """
        packing: Packing[Increment] = Packing(kind)
        for increment in increments:
            packing.add(increment)
        return packing.step(gram_row)

    def increment(self, tensor: int) -> Increment:
        """The increment of one tensor: views, no copy."""
        begin, end = self.bounds[tensor : tensor + 2].tolist()
        return self.kind(*(self.arrays[name][begin[i] : end[i]] for i, name in enumerate(self._fields)))

    def row(self, tensor: int) -> "Row[Increment]":
        """The increment of one tensor, not yet looked at."""
        return Row(self, tensor)

    @property
    def layout(self) -> tuple[list[int], list[int]]:
        """Address and item size of each field's array."""
        arrays = [self.arrays[name] for name in self._fields]
        return [array.data_ptr() for array in arrays], [array.itemsize for array in arrays]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, and on disk but for the header."""
        return sum(array.nbytes for array in self.arrays.values())

    def bytes_of_tensors(self) -> torch.Tensor:
        """Bytes of each tensor's increment, (L,) int64."""
        items = torch.tensor([self.arrays[name].itemsize for name in self._fields])
        return (self.arrays["sizes"] * items).sum(dim=1)


@dataclass(frozen=True)
class Row(Generic[Increment]):
    """An increment by where it lies: naming one costs nothing, and a step looks at all rows of each of many tensors."""

    step: PackedStep[Increment]
    tensor: int

    @property
    def increment(self) -> Increment:
        """Views, no copy."""
        return self.step.increment(self.tensor)


class Packing(Generic[Increment]):
    """Packs the increments of a step as they come, so that none lies in memory twice."""

    def __init__(self, kind: type[Increment], expected: Mapping[str, tuple[int, torch.dtype]] | None = None) -> None:
        """Start empty.

        Args:
            kind: the dataclass of the increments.
            expected: field -> elements of all increments together and their type, as far as they are known.
        """
        self.kind, self._expected = kind, dict(expected or {})
        self._fields = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        self._buffers: dict[str, torch.Tensor] = {}
        self._sizes: list[list[int]] = []
        self._used = dict.fromkeys(self._fields, 0)

    def add(self, increment: Increment) -> Increment:
        """Copy an increment behind the others; the copy, a view that holds until the next `add`."""
        arrays: dict[str, torch.Tensor] = {name: getattr(increment, name) for name in self._fields}
        copy = self.room({name: (array.numel(), array.dtype) for name, array in arrays.items()})
        for name, array in arrays.items():
            copy_over(getattr(copy, name), array)
        return copy

    def room(self, sizes: Mapping[str, tuple[int, torch.dtype]]) -> Increment:
        """Room for an increment behind the others, to be filled: views, which hold while no more than `expected` is added.

        Args:
            sizes: field -> elements and type.
        """
        ends = dict(self._used)
        for name in self._fields:
            numel, dtype = sizes[name]
            self._make_room(name, numel, dtype)
            ends[name] += numel
        views = self.kind(*(self._buffers[name][self._used[name] : ends[name]] for name in self._fields))
        self._sizes.append([ends[name] - self._used[name] for name in self._fields])
        self._used = ends
        return views

    def _make_room(self, name: str, numel: int, dtype: torch.dtype) -> None:
        needed, buffer = self._used[name] + numel, self._buffers.get(name)
        if buffer is None:
            self._buffers[name] = empty(max(needed, self._expected.get(name, (0, dtype))[0]), dtype)
        elif needed > buffer.numel():
            self._buffers[name] = empty(max(needed, 2 * buffer.numel()), dtype)
            copy_over(self._buffers[name][: self._used[name]], buffer[: self._used[name]])

    def step(self, gram_row: torch.Tensor) -> PackedStep[Increment]:
        """What was added, with this rank's part of the new row of H, (L, t) float64.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sizes:
            raise ValueError("this rank holds no weights: there is nothing to pack")
        arrays = {}
        for name in self._fields:
            buffer = self._buffers[name]
            # Room that was made and not needed would be kept for the whole run.
            if buffer.numel() > self._used[name]:
                buffer, whole = empty(self._used[name], buffer.dtype), buffer
                copy_over(buffer, whole[: self._used[name]])
            arrays[name] = buffer
        sizes = torch.tensor(self._sizes, dtype=torch.int64)
        return PackedStep(self.kind, {**arrays, "sizes": sizes, "gram_row": gram_row})


class StoredStep(Generic[Increment]):
    """A step that stays in its file: like `PackedStep`, with only the pages of the last few increments in memory."""

    def __init__(self, kind: type[Increment], path: Path, way: str = "") -> None:
        """Open it; of a file whose tensors are kept in several ways those of one, see `mixed`."""
        self.kind, self.path, self._begins = kind, path, f"{way}/" if way else ""
        self._mapped: PackedStep[Increment] = self._map()
        self._read = 0
        self._bytes: list[int] = self._mapped.bytes_of_tensors().tolist()

    def _map(self) -> PackedStep[Increment]:
        with safe_open(self.path, framework="pt") as handle:
            names = [name for name in handle.keys() if name.startswith(self._begins)]  # noqa: SIM118
            arrays = {name.removeprefix(self._begins): handle.get_tensor(name) for name in names}
        return PackedStep(self.kind, arrays)

    def increment(self, tensor: int) -> Increment:
        """The increment of one tensor: views of the file."""
        return self.row(tensor).increment

    def row(self, tensor: int) -> "Row[Increment]":
        """The increment of one tensor, not yet looked at; it holds on to its mapping."""
        if self._read > RELEASE:
            self._mapped, self._read = self._map(), 0
        self._read += self._bytes[tensor]
        return Row(self._mapped, tensor)

    def bytes_of_tensors(self) -> torch.Tensor:
        """Bytes of each tensor's increment, (L,) int64."""
        return torch.tensor(self._bytes)
