"""A run that resumes with another number of ranks, or another engine, goes on with its trajectory: all ranks together."""

import logging
import shutil
from copy import copy, deepcopy
from typing import Any

from relex_verl.pipeline.collectives import Collectives
from relex_verl.trajectory.collectors import Held
from relex_verl.trajectory.index import TrajectoryError, read_index
from relex_verl.trajectory.recut import write_rank
from relex_verl.trajectory.store import Trajectory
from relex_verl.trajectory.windows import next_folder

__all__ = ["recut"]

logger = logging.getLogger(__name__)


def recut(ranks: Collectives, window: Trajectory, held: dict[str, Held]) -> Trajectory:
    """The same window with its files, and those of the windows before, as these ranks cut the weights.

    New files are written beside the old ones, which count until the index names the new folders: a run that is killed in
    between finds what it had.

    Args:
        ranks: all of them.
        window: of `resuming.find`, the last one.
        held: this rank's shards.

    Raises:
        TrajectoryError: what one of the old ranks has written is missing or damaged.
    """
    placements = {name: shard.placement for name, shard in held.items()}
    same = window.index.world_size == ranks.world_size
    with ranks.together():
        if same:
            same = list(window.placements(ranks.rank).items()) == list(placements.items())
    if all(ranks.gather(same)):
        return window
    everyone = ranks.gather(list(placements))
    before = {name for names in everyone[: ranks.rank] for name in names}
    cut = copy(window)
    with ranks.together():
        if window.index.encodings:
            raise TrajectoryError(f"{window.folder} has tensors in kinds of their own, and is not cut otherwise")
        cut.index = _with_new_folders(window)
        if ranks.rank == 0:
            logger.warning(
                "RELEX: the trajectory in %s was written by %d ranks, and is cut anew for %d",
                window.folder, window.index.world_size, ranks.world_size,
            )  # fmt: skip
            for record in cut.index.windows:
                shutil.rmtree(window.folder / record.folder, ignore_errors=True)  # of an attempt that was killed
    cut.index.world_size = ranks.world_size
    for number in range(len(window.windows)):
        with ranks.together():
            old, new = window.of_window(number), cut.of_window(number)
            write_rank(old, new, ranks.rank, placements, set(placements) - before)
    with ranks.together():
        if ranks.rank == 0:
            cut.write_index()
            for left in window.folder.glob("rank_*"):  # of version 0.1.0
                shutil.rmtree(left, ignore_errors=True)
    return cut


def _with_new_folders(window: Trajectory) -> Any:
    """The index with a folder for each window that nothing on disk names yet."""
    index, taken = deepcopy(window.index), [record.folder for record in read_index(window.folder).windows]
    for record in index.windows:
        record.folder = next_folder(taken)
        taken.append(record.folder)
    index.schema_version = max(2, index.schema_version)
    if window.kind.quantization in ("int8", "int4"):
        index.requantized += 1
    return index
