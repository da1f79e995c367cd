"""What a trajectory's files add up to: Gram matrices, shards with their increments, and the weights of observed steps."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from relex_verl.maths import gram
from relex_verl.maths.sketch import lifted_gram
from relex_verl.maths.window import Window
from relex_verl.trajectory.encodings.fitting import check_fits
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.index import TrajectoryError, step_ranges
from relex_verl.trajectory.kernels import WORTH, load
from relex_verl.trajectory.kinds import Kind, RowCodec
from relex_verl.trajectory.parallel import all_processors, in_order
from relex_verl.trajectory.shards import Placement, TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = [
    "ShardHistory",
    "error_bound",
    "gram_rows",
    "histories",
    "increment_gram",
    "last_states",
    "origins",
    "sketched",
    "states",
    "window",
]


class ShardHistory(NamedTuple):
    """All that is known of one shard up to some step."""

    name: str
    shape: tuple[int, ...]
    placement: Placement
    anchor: torch.Tensor  # (n,) in the kind's dtype: what `Kind.accumulate` starts from
    parts: list[Any]  # the increments; the moments for a sketch
    dtype: torch.dtype  # in which the base stores the tensor: what a prediction is rounded to


def window(trajectory: Trajectory, cut: int | None = None) -> Window:
    """The rows up to a cut, G summed over the ranks; for a sketch smoothed to polynomials.

    Raises:
        TrajectoryError: no step up to the cut, or a file is missing or damaged.
    """
    steps, energy_L = trajectory.steps_until(cut), None
    if trajectory.kind.keeps_rows:
        gram_LTT = gram.delta_gram(increment_gram(trajectory, cut))
    else:
        moment_gram_Lrr, energy_LT = sketched(trajectory, cut)
        gram_LTT, energy_L = lifted_gram(moment_gram_Lrr, steps), energy_LT.sum(dim=1)
    return Window(trajectory.names, steps, gram_LTT, trajectory.record.origin_step, energy_L)


def sketched(trajectory: Trajectory, cut: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """S S^T (L, r, r) and |delta_t|^2 (L, T) of a sketch, summed over the ranks."""
    steps, size = trajectory.steps_until(cut), trajectory.kind.size
    position = {name: i for i, name in enumerate(trajectory.names)}
    total = torch.zeros(len(position), size**2 + len(steps), dtype=torch.float64)
    for rank in range(trajectory.index.world_size):
        where = torch.tensor([position[name] for name in trajectory.placements(rank)], dtype=torch.int64)
        total[where] += trajectory.load(rank, steps[-1]).arrays["gram_row"]
    return total[:, : size**2].reshape(-1, size, size), total[:, size**2 :]


def increment_gram(trajectory: Trajectory, cut: int | None = None) -> torch.Tensor:
    """H of the steps up to the cut, (L, T, T), summed over the ranks.

    Raises:
        TrajectoryError: it is a sketch.
    """
    return gram.increment_gram(gram_rows(trajectory, cut), len(trajectory.names))


def gram_rows(trajectory: Trajectory, cut: int | None = None) -> list[torch.Tensor]:
    """The rows of H's lower triangle, see `maths.gram`, summed over the ranks.

    Those of rows that were recorded without it are formed here, of the increments: a product for each pair of steps.

    Raises:
        TrajectoryError: it is a sketch.
    """
    trajectory.row_codec()
    steps = trajectory.steps_until(cut)
    position = {name: i for i, name in enumerate(trajectory.names)}
    rows = [torch.zeros(len(position), t + 1, dtype=torch.float64) for t in range(len(steps))]
    for rank in range(trajectory.index.world_size):
        placements = trajectory.placements(rank)
        where = torch.tensor([position[name] for name in placements], dtype=torch.int64)
        recorded = []
        for t, step in enumerate(steps):
            own_lt = trajectory.load(rank, step).arrays["gram_row"]
            if own_lt.shape[1]:
                rows[t][where] += own_lt
            else:
                recorded.append(t)
        for i, products in enumerate(_products(trajectory, rank, steps, recorded)):
            for t, product_t in zip(recorded, products, strict=True):
                rows[t][where[i]] += product_t
    return rows


def _products(
    trajectory: Trajectory, rank: int, steps: Sequence[int], recorded: Sequence[int]
) -> Iterator[list[torch.Tensor]]:
    """Rows of H of each tensor of a rank, (t + 1,) for each number t of a step."""
    if not recorded:
        return
    codec, packed = trajectory.row_codec(), [trajectory.stored(rank, step) for step in steps]

    def increments() -> Iterator[tuple[list[Any], int]]:
        for i, (name, placement) in enumerate(trajectory.placements(rank).items()):
            parts = [step.increment(i) for step in packed]
            _check_parts(trajectory, rank, name, parts, placement.numel, trajectory.kind.of(name))
            yield parts, placement.numel

    def rows(of: tuple[list[Any], int]) -> list[torch.Tensor]:
        parts, numel = of
        return codec.products(parts, numel, recorded)

    if trajectory.elements * len(recorded) >= WORTH:
        load()
    with all_processors() as threads:
        yield from in_order(rows, increments(), threads)


def histories(
    trajectory: Trajectory, cut: int | None = None, ranks: Sequence[int] | None = None
) -> Iterator[ShardHistory]:
    """Every shard with what is kept of it up to the cut, one at a time."""
    kind, base = trajectory.kind, trajectory.base()
    for placed, origin, parts in _shards(trajectory, base, cut, ranks):
        codec = kind.of(placed[0]).rows
        anchor = _advanced(codec, origin, parts) if codec is not None and codec.anchor_is_last else origin
        yield ShardHistory(*placed, anchor, parts, base.dtype(placed[0]))


def last_states(
    trajectory: Trajectory, cut: int | None = None, ranks: Sequence[int] | None = None
) -> Iterator[TensorShard]:
    """Every shard at the last observed step up to the cut, one at a time, in the kind's dtype.

    Raises:
        TrajectoryError: it is a sketch.
    """
    trajectory.row_codec()
    for placed, origin, parts in _shards(trajectory, trajectory.base(), cut, ranks):
        yield TensorShard(*placed, _advanced(trajectory.row_codec(placed[0]), origin, parts))


def _shards(
    trajectory: Trajectory, base: BaseCheckpoint, cut: int | None, ranks: Sequence[int] | None
) -> Iterator[tuple[tuple[str, tuple[int, ...], Placement], torch.Tensor, list[Any]]]:
    """Name, shape and placement; theta_0; parts."""
    steps, kind = trajectory.steps_until(cut), trajectory.kind
    for rank in range(trajectory.index.world_size) if ranks is None else ranks:
        placements = trajectory.placements(rank)
        packed = [trajectory.stored(rank, step) for step in (steps if kind.keeps_rows else steps[-1:])]
        origin = trajectory.origin(rank, base, placements)
        for i, (name, placement) in enumerate(placements.items()):
            if kind.keeps_rows:
                parts = [step.increment(i) for step in packed]
            else:
                parts = [packed[0].increment(kind.size * i + j) for j in range(kind.size)]
            _check_parts(trajectory, rank, name, parts, placement.numel, kind.of(name))
            yield (name, tuple(trajectory.index.tensors[name]), placement), origin[name], parts


def _check_parts(trajectory: Trajectory, rank: int, name: str, parts: Sequence[Any], numel: int, kind: Kind) -> None:
    try:
        for part in parts:
            check_fits(part, numel, kind.part)
    except ValueError as error:
        raise TrajectoryError(f"{trajectory.rank_folder(rank)} is damaged: {name}: {error}") from error


def _advanced(codec: RowCodec, origin: torch.Tensor, increments: Sequence[Any]) -> torch.Tensor:
    state = origin.clone()  # it may be a view of a memory-mapped file
    for increment in increments:
        codec.advance(state, increment)
    return state


def error_bound(trajectory: Trajectory, step: int) -> float:
    """How far a weight can be from the engine's own: 0 for bf16, else a quantum each time it was quantised."""
    if step == trajectory.record.origin_step:
        return 0.0
    _check_observed(trajectory, step)
    kind, bounds = trajectory.kind, [0.0]
    for rank in range(trajectory.index.world_size):
        packed = trajectory.load(rank, step)
        for i, name in enumerate(trajectory.placements(rank)):
            codec = kind.of(name).rows
            assert codec is not None
            bounds.append(codec.error_bound(packed.increment(i)))
    return max(bounds) * (1 + trajectory.index.requantized)


def states(trajectory: Trajectory, step: int) -> Iterator[TensorShard]:
    """Every shard as it was at an observed step or at the origin: bit for bit for bf16, the reconstruction for fp32.

    Raises:
        TrajectoryError: the step was not observed, or a sketch does not keep it.
    """
    if step == trajectory.record.origin_step:
        yield from origins(trajectory)
        return
    _check_observed(trajectory, step)
    yield from last_states(trajectory, step)


def _check_observed(trajectory: Trajectory, step: int) -> None:
    trajectory.row_codec()
    if step not in trajectory.steps:
        raise TrajectoryError(
            f"step {step} was not observed; {trajectory.folder} holds {step_ranges(trajectory.steps)}"
        )


def origins(trajectory: Trajectory, ranks: Sequence[int] | None = None) -> Iterator[TensorShard]:
    """theta_0 of every shard, one at a time, in their kind's dtype."""
    base = trajectory.base()
    for rank in range(trajectory.index.world_size) if ranks is None else ranks:
        placements = trajectory.placements(rank)
        origin = trajectory.origin(rank, base, placements)
        for name, placement in placements.items():
            yield TensorShard(name, tuple(trajectory.index.tensors[name]), placement, origin[name])
