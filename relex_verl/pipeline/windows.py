"""Begin another window of a trajectory, or go on in one: all ranks together."""

import shutil
from collections.abc import Mapping
from typing import Any

import torch

from relex_verl.pipeline.collectives import Collectives
from relex_verl.pipeline.engine_shards import counted, exhausted
from relex_verl.trajectory import replay
from relex_verl.trajectory.collectors import Collector
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.shards import ShardSource
from relex_verl.trajectory.store import Trajectory

__all__ = ["begin", "following", "go_on"]


def following(
    ranks: Collectives, trajectory: Trajectory, step: int, jump: Mapping[str, Any] | None, undone: bool
) -> Trajectory:
    """The window after the last one, of which nothing is there yet: what an earlier attempt left of it is deleted.

    Args:
        ranks: all of them.
        trajectory: its last window.
        step: of theta_0.
        jump, undone: how theta_0 came to be, see `WindowRecord`.

    Raises:
        TrajectoryError: it cannot begin so.
    """
    window = trajectory
    with ranks.together():
        window = trajectory.begin_window(step, jump, undone)
        if ranks.rank == 0:
            _delete_unnamed(trajectory)
    return window


def begin(
    ranks: Collectives, window: Trajectory, source: ShardSource, collector: Collector, states: torch.Tensor
) -> None:
    """Take theta_0 of a window from the engine; it counts from here on.

    Args:
        ranks: all of them.
        window: of `following`.
        source: the engine's weights.
        collector: of this rank; it lets go of the window before.
        states: those of the shards that it holds, end to end; overwritten.

    Raises:
        ValueError: weights that are not finite; shards that differ from those before. Nothing on disk counts, and the
            collector is of no use any more.
    """
    held = collector.held
    with ranks.together(), exhausted(source) as shards:
        for i, shard, data in counted(shards, held, window.names):
            if not data.isfinite().all():
                name = list(held)[i]
                raise ValueError(f"{name}: weights are not finite (NaN or infinity): no window can begin from them")
            shard.state.copy_(data)
        window.declare_rank(ranks.rank, {name: shard.placement for name, shard in held.items()}, states)
        collector.begin(held, len(window.names))
    with ranks.together():
        if ranks.rank == 0:
            window.write_index()


def go_on(ranks: Collectives, window: Trajectory, collector: Collector) -> None:
    """Bring a collector to where a window stands; on disk no other step, and no later window, counts from here on.

    Args:
        ranks: all of them.
        window: of `resuming.find`.
        collector: of this rank, with its shards.

    Raises:
        TrajectoryError: they are cut otherwise between the ranks.
    """
    held = collector.held
    with ranks.together():
        placements = {name: shard.placement for name, shard in held.items()}
        if list(window.placements(ranks.rank).items()) != list(placements.items()):
            raise TrajectoryError(f"{window.folder} was written with the weights cut otherwise between the ranks")
        for shard in replay.origins(window, [ranks.rank]):
            held[shard.name].state.copy_(shard.data)
        collector.begin(held, len(window.names))
        if window.steps:
            collector.resume(window, ranks.rank, window.steps[-1])
    with ranks.together():
        if ranks.rank == 0:
            window.write_index()
            _delete_unnamed(window)


def _delete_unnamed(trajectory: Trajectory) -> None:
    """The folders of windows that do not count: those of later ones, or of one that was never begun to the end."""
    named = {record.folder for record in trajectory.index.windows}
    for path in trajectory.folder.glob("window_*"):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)
