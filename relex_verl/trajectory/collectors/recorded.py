"""Rows that are on disk and nowhere else."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from relex_verl.maths.window import Window
from relex_verl.trajectory.collectors.collector import ALL, Held, Taken, check_later
from relex_verl.trajectory.encodings import PackedStep, Packing
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.store import Trajectory

__all__ = ["RowRecorder"]

ON_DISK = "rows that are recorded are on disk alone: read them from the trajectory there"


class RowRecorder:
    """The state, and one row at a time: memory does not grow with the run.

    No inner product with another row is formed. Its file says so by a row of H with no element, and who needs the products
    forms them from the files (`replay.gram_rows`).
    """

    def __init__(self, kind: Kind, held: dict[str, Held] | None = None, steps: Sequence[int] = ()) -> None:
        """Go on after some rows.

        Args:
            kind: of rows.
            held: this rank's shards, with the state at the last of the rows.
            steps: theirs.
        """
        assert kind.rows is not None
        self.kind, self.codec = kind, kind.rows
        self.held, self.steps = dict(held or {}), list(steps)
        self._taken: PackedStep[Any] | None = None
        self._bytes_l = torch.zeros(len(self.held), dtype=torch.float64)

    def begin(self, held: dict[str, Held], tensors: int) -> None:
        """See `Collector`."""
        self.held, self.steps, self._taken = held, [], None
        self._bytes_l = torch.zeros(len(held), dtype=torch.float64)

    def warm_up(self, dtype: torch.dtype) -> None:
        """See `Collector`; `RowCollector` has done it."""

    def resume(self, trajectory: Trajectory, rank: int, step: int) -> None:
        """See `Collector`; one row in memory at a time."""
        self.steps = trajectory.steps_until(step)
        for observed in self.steps:
            packed = trajectory.stored(rank, observed)
            self._bytes_l += packed.bytes_of_tensors()
            for i, held in enumerate(self.held.values()):
                check_fits(increment := packed.increment(i), len(held.state), self.kind.part)
                self.codec.advance(held.state, increment)

    def take(self, step: int, shards: Iterator[tuple[int, Held, torch.Tensor]]) -> Taken:
        """See `Collector`; k = 0."""
        check_later(step, self.steps)
        packing: Packing[Any] = Packing(self.kind.part, self.codec.sizes([len(h.state) for h in self.held.values()]))
        nothing_l0 = torch.zeros(len(self.held), 0, dtype=torch.float64)
        changed_l = torch.zeros(len(self.held), dtype=torch.float64)
        for i, held, data in shards:
            sizes = self.codec.sizes([len(held.state)])
            room = packing.room(sizes) if sizes else None
            increment, _, changed_l[i] = self.codec.take(held.state, data, [], room)
            if room is None:
                packing.add(increment)
        self._taken = packing.step(nothing_l0)
        return Taken(nothing_l0, changed_l, self._taken)

    def keep(self, step: int, figures_Lk: torch.Tensor) -> None:
        """See `Collector`."""
        taken, self._taken = self._taken, None
        assert taken is not None
        self.steps.append(step)
        for i, held in enumerate(self.held.values()):
            self.codec.advance(held.state, taken.increment(i))

    def snapshot(self) -> None:
        """See `Collector`."""
        return

    def window(self, names: Sequence[str], origin_step: int, of: slice = ALL) -> Window:
        """See `Collector`."""
        raise NotImplementedError(ON_DISK)

    def parts(self, position: int) -> list[Any]:
        """See `Collector`."""
        raise NotImplementedError(ON_DISK)

    def bytes_of_tensors(self) -> torch.Tensor:
        """See `Collector`; of the rows that it was resumed with."""
        return self._bytes_l
