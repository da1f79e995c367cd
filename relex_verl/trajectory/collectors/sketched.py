"""A sketch of all rows of a window, in memory that does not grow with it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from relex_verl.maths.sketch import interval, legendre, lifted_gram, rebase
from relex_verl.maths.window import Window
from relex_verl.trajectory import replay
from relex_verl.trajectory.collectors.collector import ALL, Held, Taken, check_later, naming
from relex_verl.trajectory.encodings import PackedStep
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.kernels import warm_up
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.store import Trajectory

__all__ = ["SketchCollector"]


class SketchCollector:
    """A sketch: r moments of every weight over the steps, whatever their number. Rows are looked at once and forgotten.

    A step that fails half-way leaves the moments half updated: nothing after it is accepted (what is on disk is whole).
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.held: dict[str, Held] = {}
        self.steps: list[int] = []
        self._moments: PackedStep[Any] | None = None  # tensor by tensor, r moments each
        self._own_gram_lrr = self._gram_Lrr = torch.zeros(0, kind.size, kind.size, dtype=torch.float64)
        self._own_energy_lT = self._energy_LT = torch.zeros(0, 0, dtype=torch.float64)
        self._torn = False

    def begin(self, held: dict[str, Held], tensors: int) -> None:
        """See `Collector`."""
        size = self.kind.size
        self.held, self.steps, self._torn = held, [], False
        self._moments = None  # those of the window before make room first
        numel = [shard.placement.numel for shard in held.values()]
        arrays = {
            "value": torch.zeros(size * sum(numel)),
            "sizes": torch.tensor([[n] for n in numel for _ in range(size)], dtype=torch.int64).view(-1, 1),
            "gram_row": torch.zeros(0, 0, dtype=torch.float64),
        }
        self._moments = PackedStep(self.kind.part, arrays)
        self._own_gram_lrr = torch.zeros(len(held), size, size, dtype=torch.float64)
        self._gram_Lrr = torch.zeros(tensors, size, size, dtype=torch.float64)
        self._own_energy_lT = torch.zeros(len(held), 0, dtype=torch.float64)
        self._energy_LT = torch.zeros(tensors, 0, dtype=torch.float64)

    def warm_up(self, dtype: torch.dtype) -> None:
        """See `Collector`."""
        assert self.kind.add_row is not None
        add_row, size = self.kind.add_row, self.kind.size

        def work() -> None:
            origin, moments = torch.zeros(1), [self.kind.part(torch.zeros(1)) for _ in range(size)]
            add_row(origin, torch.ones(1, dtype=dtype), moments, [1.0] * size, None)
            self.kind.accumulate(origin, moments, [1.0] * size)

        warm_up(sum(len(held.state) for held in self.held.values()), work)

    def resume(self, trajectory: Trajectory, rank: int, step: int) -> None:
        """See `Collector`."""
        self.steps, size = trajectory.steps_until(step), self.kind.size
        stored = trajectory.load(rank, self.steps[-1])
        # Not the mapped file: they are written to.
        arrays = {name: array.clone() for name, array in stored.arrays.items()}
        self._moments = PackedStep(self.kind.part, arrays)
        for i, held in enumerate(self.held.values()):
            for j in range(size):
                check_fits(self._moments.increment(size * i + j), len(held.state), self.kind.part)
        own = arrays["gram_row"]
        self._own_gram_lrr, self._own_energy_lT = own[:, : size**2].view(-1, size, size), own[:, size**2 :]
        self._gram_Lrr, self._energy_LT = replay.sketched(trajectory, step)

    def take(self, step: int, shards: Iterator[tuple[int, Held, torch.Tensor]]) -> Taken:
        """See `Collector`; k = r^2 + 1, S S^T and |delta_t|^2."""
        if self._torn:
            raise RuntimeError("an earlier step was sketched half-way: resume from the trajectory on disk")
        check_later(step, self.steps)
        self._torn = True
        size, first = self.kind.size, (self.steps or [step])[0]
        length = interval(first, step)
        before = interval(first, self.steps[-1]) if self.steps else length
        change = rebase(before, length, size) if length != before else None
        weights = legendre([step], first, length, size)[0].tolist()
        figures_lk = torch.zeros(len(self.held), size**2 + 1, dtype=torch.float64)
        assert self.kind.add_row is not None
        for i, held, data in shards:
            with naming(self.held, i):
                figures_lk[i] = self.kind.add_row(held.state, data, self.parts(i), weights, change)
        self._own_gram_lrr = figures_lk[:, :-1].reshape(-1, size, size)
        self._own_energy_lT = torch.cat([self._own_energy_lT, figures_lk[:, -1:]], dim=1)
        return Taken(figures_lk, torch.full((len(self.held),), torch.nan, dtype=torch.float64), None)

    def keep(self, step: int, figures_Lk: torch.Tensor) -> None:
        """See `Collector`."""
        size = self.kind.size
        self._gram_Lrr = figures_Lk[:, :-1].reshape(-1, size, size)
        self._energy_LT = torch.cat([self._energy_LT, figures_Lk[:, -1:]], dim=1)
        self.steps.append(step)
        self._torn = False

    def snapshot(self) -> PackedStep[Any] | None:
        """See `Collector`; `gram_row` is (l, r^2 + T): this rank's part of S S^T and of each |delta_t|^2."""
        assert self._moments is not None
        if not self.steps or self._torn:
            return None
        self._moments.arrays["gram_row"] = torch.cat([self._own_gram_lrr.flatten(1), self._own_energy_lT], dim=1)
        return self._moments

    def window(self, names: Sequence[str], origin_step: int, of: slice = ALL) -> Window:
        """See `Collector`."""
        gram_LTT, energy_L = lifted_gram(self._gram_Lrr[of], self.steps), self._energy_LT[of].sum(dim=1)
        return Window(names[of], list(self.steps), gram_LTT, origin_step, energy_L)

    def parts(self, position: int) -> list[Any]:
        """See `Collector`."""
        assert self._moments is not None
        size = self.kind.size
        return [self._moments.increment(size * position + j) for j in range(size)]

    def bytes_of_tensors(self) -> torch.Tensor:
        """See `Collector`."""
        assert self._moments is not None
        return self._moments.bytes_of_tensors().double().view(-1, self.kind.size).sum(dim=1)
