"""Every row of a window."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from relex_verl.maths.gram import delta_gram, increment_gram
from relex_verl.maths.window import Window
from relex_verl.trajectory import replay
from relex_verl.trajectory.collectors.collector import Held, Taken
from relex_verl.trajectory.encodings import PackedStep, Packing, Row, StoredStep
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.kernels import warm_up
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.parallel import in_order
from relex_verl.trajectory.store import Trajectory

__all__ = ["RowCollector"]


class RowCollector:
    """Every row: one encoded increment a step, and H, the Gram matrix of the increments.

    Attributes:
        threads: tensors that are worked on at a time; more than one where shards stay as they are until the step is done,
            as files do.
    """

    def __init__(self, kind: Kind) -> None:
        assert kind.rows is not None
        self.kind, self.codec = kind, kind.rows
        self.threads = 1
        self.held: dict[str, Held] = {}
        self.steps: list[int] = []
        self.packed: list[PackedStep[Any] | StoredStep[Any]] = []
        self._tensors = 0
        self._gram_rows: list[torch.Tensor] = []  # of H's lower triangle, (L, t) each
        self._taken: PackedStep[Any] | None = None

    def begin(self, held: dict[str, Held], tensors: int) -> None:
        """See `Collector`."""
        self.held, self.steps, self.packed, self._taken = held, [], [], None
        self._tensors, self._gram_rows = tensors, []

    def warm_up(self, dtype: torch.dtype) -> None:
        """See `Collector`."""

        def work() -> None:
            state, packing = torch.zeros(1, dtype=self.kind.dtype), Packing[Any](self.kind.part)
            sizes = self.codec.sizes([1])
            room = packing.room(sizes) if sizes else None
            increment, _, _ = self.codec.take(state, torch.ones(1, dtype=dtype), [], room)
            self.codec.advance(state, increment)
            self.kind.accumulate(state, [increment], [1.0])

        warm_up(sum(len(held.state) for held in self.held.values()), work)

    def resume(self, trajectory: Trajectory, rank: int, step: int) -> None:
        """See `Collector`."""
        self.steps = trajectory.steps_until(step)
        self.packed = [trajectory.load(rank, observed) for observed in self.steps]
        for i, held in enumerate(self.held.values()):
            for packed in self.packed:
                check_fits(increment := packed.increment(i), len(held.state))
                self.codec.advance(held.state, increment)
        self._gram_rows = replay.gram_rows(trajectory, step)

    def take(self, step: int, shards: Iterator[tuple[int, Held, torch.Tensor]]) -> Taken:
        """See `Collector`; k = T + 1, the new row of H."""
        packing: Packing[Any] = Packing(self.kind.part, self.codec.sizes([len(h.state) for h in self.held.values()]))
        row_lT = torch.zeros(len(self.held), len(self.packed) + 1, dtype=torch.float64)
        changed_l = torch.zeros(len(self.held), dtype=torch.float64)
        for i, increment, row_T, changed in in_order(self._look, self._asked(packing, shards), self.threads):
            if increment is not None:
                packing.add(increment)
            row_lT[i], changed_l[i] = row_T, changed
        self._taken = packing.step(row_lT)
        return Taken(row_lT, changed_l, self._taken)

    def _asked(
        self, packing: Packing[Any], shards: Iterator[tuple[int, Held, torch.Tensor]]
    ) -> Iterator[tuple[int, Held, torch.Tensor, list[Row[Any]], Any]]:
        for i, held, data in shards:
            sizes = self.codec.sizes([len(held.state)])
            yield i, held, data, [packed.row(i) for packed in self.packed], packing.room(sizes) if sizes else None

    def _look(self, item: tuple[int, Held, torch.Tensor, list[Row[Any]], Any]) -> tuple[int, Any, torch.Tensor, int]:
        """The increment is None where it was put into the room that there is for it."""
        i, held, data, before, room = item
        increment, row_T, changed = self.codec.take(held.state, data, before, room)
        return i, None if room is not None else increment, row_T, changed

    def keep(self, step: int, figures_Lk: torch.Tensor) -> None:
        """See `Collector`."""
        taken, self._taken = self._taken, None  # whoever moves this row to disk lets go of its memory
        assert taken is not None
        self._gram_rows.append(figures_Lk)
        self.packed.append(taken)
        self.steps.append(step)
        states = enumerate(held.state for held in self.held.values())
        for _ in in_order(
            lambda numbered: self.codec.advance(numbered[1], taken.increment(numbered[0])), states, self.threads
        ):
            pass

    def leave_to_disk(self, trajectory: Trajectory, rank: int) -> None:
        """Hold no increment in memory whose file is there: for a pass that has time to read them again."""
        self.packed = [
            step_kept if isinstance(step_kept, StoredStep) else trajectory.stored(rank, step)
            for step_kept, step in zip(self.packed, self.steps, strict=True)
        ]

    def snapshot(self) -> None:
        """See `Collector`."""
        return

    def window(self, names: Sequence[str], origin_step: int) -> Window:
        """See `Collector`."""
        return Window(names, list(self.steps), delta_gram(increment_gram(self._gram_rows, self._tensors)), origin_step)

    @property
    def squares_LT(self) -> torch.Tensor:
        """|e_t|^2 of every tensor and step, (L, T): H's diagonal."""
        columns = [row_Lt[:, -1] for row_Lt in self._gram_rows]
        return torch.stack(columns, dim=1) if columns else torch.zeros(self._tensors, 0, dtype=torch.float64)

    def parts(self, position: int) -> list[Any]:
        """See `Collector`."""
        return [packed.increment(position) for packed in self.packed]

    def bytes_of_tensors(self) -> torch.Tensor:
        """See `Collector`."""
        zero = torch.zeros(len(self.held), dtype=torch.float64)
        return sum((packed.bytes_of_tensors() for packed in self.packed), start=zero)
