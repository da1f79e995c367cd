"""A step of a rank whose tensors are not all kept in one way: float32 router biases among bfloat16 weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from relex_verl.trajectory.encodings.packed import PackedStep, Row, StoredStep

__all__ = ["MixedStep", "read_step", "stored_step"]

TENSORS = "tensors"


class MixedStep:
    """Like `PackedStep`: one of these, or a `StoredStep`, for each way in which tensors are kept.

    Attributes:
        on_disk: they are `StoredStep`.
    """

    def __init__(
        self,
        steps: Mapping[str, PackedStep[Any] | StoredStep[Any]],
        tensors: Mapping[str, Sequence[int]],
        gram_row: torch.Tensor | None = None,
    ) -> None:
        """Put them together.

        Args:
            steps: name of each way -> the increments of the tensors that are kept so.
            tensors: the same -> which of the rank's tensors they are, in their order.
            gram_row: (l, t) float64, this rank's part of the new row of H; None of what stays in its file.

        Raises:
            ValueError: a tensor that is kept twice or not at all.
        """
        self._steps, self._tensors, self._gram_row = dict(steps), dict(tensors), gram_row
        self.on_disk = gram_row is None
        places = [(tensor, (steps[way], i)) for way, mine in tensors.items() for i, tensor in enumerate(mine)]
        self._at = dict(places)
        if sorted(tensor for tensor, _ in places) != list(range(len(places))):
            raise ValueError("it does not hold each of its tensors once")
        for way, mine in tensors.items():
            if len(steps[way].bytes_of_tensors()) != len(mine):
                raise ValueError(f"what it keeps as {way} is not of as many tensors as it says")

    @property
    def arrays(self) -> dict[str, torch.Tensor]:
        """Those of each way behind its name, `tensors` (l,) int64 among them; `gram_row` of all tensors."""
        assert self._gram_row is not None
        arrays = {"gram_row": self._gram_row}
        for way, step in self._steps.items():
            assert isinstance(step, PackedStep)
            arrays |= {f"{way}/{name}": array for name, array in step.arrays.items() if name != "gram_row"}
            arrays[f"{way}/{TENSORS}"] = torch.tensor(self._tensors[way], dtype=torch.int64)
        return arrays

    def increment(self, tensor: int) -> Any:
        """See `PackedStep`."""
        step, i = self._at[tensor]
        return step.increment(i)

    def row(self, tensor: int) -> Row[Any]:
        """See `PackedStep`."""
        step, i = self._at[tensor]
        return step.row(i)

    def bytes_of_tensors(self) -> torch.Tensor:
        """See `PackedStep`."""
        bytes_l = torch.zeros(len(self._at), dtype=torch.int64)
        for way, step in self._steps.items():
            bytes_l[list(self._tensors[way])] = step.bytes_of_tensors()
        return bytes_l


def read_step(ways: Mapping[str, type], arrays: Mapping[str, torch.Tensor]) -> PackedStep[Any] | MixedStep:
    """What the arrays of a step's file hold.

    Args:
        ways: name -> type of its increments; a single one has its arrays under their own names.
        arrays: of the file.

    Raises:
        ValueError: arrays that do not belong together.
    """
    if len(ways) == 1:
        return PackedStep(next(iter(ways.values())), arrays)
    steps: dict[str, PackedStep[Any] | StoredStep[Any]] = {
        way: PackedStep(kind, _of_way(way, arrays)) for way, kind in ways.items() if f"{way}/{TENSORS}" in arrays
    }
    return MixedStep(steps, {way: arrays[f"{way}/{TENSORS}"].tolist() for way in steps}, arrays["gram_row"])


def stored_step(ways: Mapping[str, type], path: Path) -> StoredStep[Any] | MixedStep:
    """The same, of which only the increments in use are in memory."""
    if len(ways) == 1:
        return StoredStep(next(iter(ways.values())), path)
    with safe_open(path, framework="pt") as handle:
        there = [way for way in ways if f"{way}/{TENSORS}" in handle.keys()]  # noqa: SIM118
        tensors = {way: handle.get_tensor(f"{way}/{TENSORS}").tolist() for way in there}
    return MixedStep({way: StoredStep(ways[way], path, way) for way in there}, tensors)


def _of_way(way: str, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{way}/"): array for name, array in arrays.items() if name.startswith(f"{way}/")}
