"""Every row of a window."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from relex_verl.maths.gram import delta_gram, increment_gram
from relex_verl.maths.window import Window
from relex_verl.trajectory import replay
from relex_verl.trajectory.collectors.collector import ALL, Held, Taken, check_later, naming
from relex_verl.trajectory.encodings import MixedStep, PackedStep, Packing, Row, StoredStep
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.kernels import warm_up
from relex_verl.trajectory.kinds import Kind, RowCodec
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
        self.kind, self.threads = kind, 1
        self.held: dict[str, Held] = {}
        self.steps: list[int] = []
        self.packed: list[PackedStep[Any] | StoredStep[Any] | MixedStep] = []
        self._kinds: list[Kind] = []  # of each shard held
        self._tensors = 0
        self._gram_rows: list[torch.Tensor] = []  # of H's lower triangle, (L, t) each
        self._taken: PackedStep[Any] | MixedStep | None = None

    def begin(self, held: dict[str, Held], tensors: int) -> None:
        """See `Collector`."""
        self.held, self.steps, self.packed, self._taken = held, [], [], None
        self._tensors, self._gram_rows = tensors, []
        self._kinds = [self.kind.of(name) for name in held]

    def warm_up(self, dtype: torch.dtype) -> None:
        """See `Collector`."""

        def work() -> None:
            codec, state = _codec(self.kind), torch.zeros(1, dtype=self.kind.dtype)
            sizes = codec.sizes([1])
            room = Packing[Any](self.kind.part).room(sizes) if sizes else None
            increment, _, _ = codec.take(state, torch.ones(1, dtype=dtype), [], room)
            codec.advance(state, increment)
            self.kind.accumulate(state, [increment], [1.0])

        warm_up(sum(len(held.state) for held in self.held.values()), work)

    def resume(self, trajectory: Trajectory, rank: int, step: int) -> None:
        """See `Collector`."""
        self.steps = trajectory.steps_until(step)
        self.packed = [trajectory.load(rank, observed) for observed in self.steps]
        for i, (kind, held) in enumerate(zip(self._kinds, self.held.values(), strict=True)):
            for packed in self.packed:
                check_fits(increment := packed.increment(i), len(held.state), kind.part)
                _codec(kind).advance(held.state, increment)
        self._gram_rows = replay.gram_rows(trajectory, step)

    def take(self, step: int, shards: Iterator[tuple[int, Held, torch.Tensor]]) -> Taken:
        """See `Collector`; k = T + 1, the new row of H."""
        check_later(step, self.steps)
        packings = self._packings()
        row_lT = torch.zeros(len(self.held), len(self.packed) + 1, dtype=torch.float64)
        changed_l = torch.zeros(len(self.held), dtype=torch.float64)
        for i, increment, row_T, changed in in_order(self._look, self._asked(packings, shards), self.threads):
            if increment is not None:
                packings[self._kinds[i].name].add(increment)
            row_lT[i], changed_l[i] = row_T, changed
        self._taken = self._step(packings, row_lT)
        return Taken(row_lT, changed_l, self._taken)

    def _of_kind(self, name: str) -> list[int]:
        """Positions of the shards that are kept so."""
        return [i for i, kind in enumerate(self._kinds) if kind.name == name]

    def _packings(self) -> dict[str, Packing[Any]]:
        """Name of each kind -> room for the increments of the shards that are kept so."""
        numels, packings = [len(held.state) for held in self.held.values()], {}
        for kind in {kind.name: kind for kind in (self.kind, *self._kinds)}.values():
            sizes = _codec(kind).sizes([numels[i] for i in self._of_kind(kind.name)])
            packings[kind.name] = Packing[Any](kind.part, sizes)
        return packings

    def _step(self, packings: dict[str, Packing[Any]], row_lT: torch.Tensor) -> PackedStep[Any] | MixedStep:
        if not self.kind.own:
            return packings[self.kind.name].step(row_lT)
        tensors = {name: mine for name in packings if (mine := self._of_kind(name))}
        return MixedStep({name: packings[name].step(row_lT) for name in tensors}, tensors, row_lT)

    def _asked(
        self, packings: dict[str, Packing[Any]], shards: Iterator[tuple[int, Held, torch.Tensor]]
    ) -> Iterator[tuple[int, Held, torch.Tensor, list[Row[Any]], Any]]:
        for i, held, data in shards:
            kind = self._kinds[i]
            sizes = _codec(kind).sizes([len(held.state)])
            room = packings[kind.name].room(sizes) if sizes else None
            yield i, held, data, [packed.row(i) for packed in self.packed], room

    def _look(self, item: tuple[int, Held, torch.Tensor, list[Row[Any]], Any]) -> tuple[int, Any, torch.Tensor, int]:
        """The increment is None where it was put into the room that there is for it."""
        i, held, data, before, room = item
        with naming(self.held, i):
            increment, row_T, changed = _codec(self._kinds[i]).take(held.state, data, before, room)
        return i, None if room is not None else increment, row_T, changed

    def keep(self, step: int, figures_Lk: torch.Tensor) -> None:
        """See `Collector`."""
        taken, self._taken = self._taken, None  # whoever moves this row to disk lets go of its memory
        assert taken is not None
        self._gram_rows.append(figures_Lk)
        self.packed.append(taken)
        self.steps.append(step)

        def advance(numbered: tuple[int, Held]) -> None:
            i, held = numbered
            _codec(self._kinds[i]).advance(held.state, taken.increment(i))

        for _ in in_order(advance, enumerate(self.held.values()), self.threads):
            pass

    def leave_to_disk(self, trajectory: Trajectory, rank: int) -> None:
        """Hold no increment in memory whose file is there: for a pass that has time to read them again."""
        self.packed = [
            step_kept if _is_on_disk(step_kept) else trajectory.stored(rank, step)
            for step_kept, step in zip(self.packed, self.steps, strict=True)
        ]

    def snapshot(self) -> None:
        """See `Collector`."""
        return

    def window(self, names: Sequence[str], origin_step: int, of: slice = ALL) -> Window:
        """See `Collector`."""
        gram_LTT = increment_gram([row_Lt[of] for row_Lt in self._gram_rows], len(names[of]))
        return Window(names[of], list(self.steps), delta_gram(gram_LTT), origin_step)

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


def _is_on_disk(packed: PackedStep[Any] | StoredStep[Any] | MixedStep) -> bool:
    return packed.on_disk if isinstance(packed, MixedStep) else isinstance(packed, StoredStep)


def _codec(kind: Kind) -> RowCodec:
    assert kind.rows is not None
    return kind.rows
