"""A sketch of all rows of a window, in memory that does not grow with it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from relex_verl.maths.sketch import interval, legendre, lifted_gram, rebase
from relex_verl.maths.window import Window
from relex_verl.trajectory import replay
from relex_verl.trajectory.collectors.collector import Held, Taken
from relex_verl.trajectory.encodings import PackedStep
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.store import Trajectory

__all__ = ["SketchCollector"]

# Elements of a moment at a time: the float32 change of so many weights (4 MiB) stays near the caches.
CHUNK = 2**20


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

    def resume(self, trajectory: Trajectory, rank: int, step: int) -> None:
        """See `Collector`."""
        self.steps, size = trajectory.steps_until(step), self.kind.size
        stored = trajectory.load(rank, self.steps[-1])
        # Not the mapped file: they are written to.
        arrays = {name: array.clone() for name, array in stored.arrays.items()}
        self._moments = PackedStep(self.kind.part, arrays)
        own = arrays["gram_row"]
        self._own_gram_lrr, self._own_energy_lT = own[:, : size**2].view(-1, size, size), own[:, size**2 :]
        self._gram_Lrr, self._energy_LT = replay.sketched(trajectory, step)

    def take(self, step: int, shards: Iterator[tuple[int, Held, torch.Tensor]]) -> Taken:
        """See `Collector`; k = r^2 + 1, S S^T and |delta_t|^2."""
        if self._torn:
            raise RuntimeError("an earlier step was sketched half-way: resume from the trajectory on disk")
        self._torn = True
        size, first = self.kind.size, (self.steps or [step])[0]
        length = interval(first, step)
        before = interval(first, self.steps[-1]) if self.steps else length
        change = rebase(before, length, size) if length != before else None
        weights = legendre([step], first, length, size)[0].tolist()
        figures_lk = torch.zeros(len(self.held), size**2 + 1, dtype=torch.float64)
        for i, held, data in shards:
            moments = [part.value for part in self.parts(i)]
            figures_lk[i] = _add_row(moments, held.state, data, weights, change)
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

    def window(self, names: Sequence[str], origin_step: int) -> Window:
        """See `Collector`."""
        gram_LTT, energy_L = lifted_gram(self._gram_Lrr, self.steps), self._energy_LT.sum(dim=1)
        return Window(names, list(self.steps), gram_LTT, origin_step, energy_L)

    def parts(self, position: int) -> list[Any]:
        """See `Collector`."""
        assert self._moments is not None
        size = self.kind.size
        return [self._moments.increment(size * position + j) for j in range(size)]

    def bytes_of_tensors(self) -> torch.Tensor:
        """See `Collector`."""
        assert self._moments is not None
        return self._moments.bytes_of_tensors().double().view(-1, self.kind.size).sum(dim=1)


def _add_row(
    moments: list[torch.Tensor],
    origin: torch.Tensor,
    now: torch.Tensor,
    weights: list[float],
    change: torch.Tensor | None,
) -> torch.Tensor:
    """Add one row to the moments of a shard, in place; a piece at a time, so that memory is read and written once.

    Args:
        moments: r tensors (n,) float32 on the host.
        origin: (n,) float32, theta_0.
        now: (n,) the weights, on any device.
        weights: P_j of the row.
        change: (r, r) of `rebase`, when the interval has grown.

    Returns:
        (r^2 + 1,) float64: S S^T, and the square of the row's norm.

    Raises:
        ValueError: weights that are not finite.
    """
    size = len(moments)
    gram_rr, square = torch.zeros(size, size, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for start in range(0, len(origin), CHUNK):
        piece = slice(start, min(start + CHUNK, len(origin)))
        delta = now[piece].to("cpu", torch.float32) - origin[piece]
        if not delta.isfinite().all():
            raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
        block_rn = torch.stack([moment[piece] for moment in moments])
        if change is not None:
            block_rn = change.float() @ block_rn
        for j, weight in enumerate(weights):
            moments[j][piece] = block_rn[j].add_(delta, alpha=weight)
        exact_rn, exact_n = block_rn.double(), delta.double()
        gram_rr += exact_rn @ exact_rn.T
        square += exact_n @ exact_n
    return torch.cat([gram_rr.flatten(), square.view(1)])
