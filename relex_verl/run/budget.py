"""What following a run costs in host memory and disk, and whether the machine has it: asked before the first step."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from relex_verl.trajectory.kinds import Kind

__all__ = [
    "ASSUMED_CHANGE_RATE",
    "Budget",
    "BudgetError",
    "Traffic",
    "available_memory",
    "budget",
    "change_between_rows",
    "check_disk",
    "check_memory",
    "gib",
    "traffic",
]

# Share of the bf16 weights that change from one RL step to the next: 0.5-3 % as published for RL of language models
# (verl's delta-sync measurements; PULSE, arXiv:2602.03839), so that 3 % is on the safe side.
ASSUMED_CHANGE_RATE = 0.03
# Files of a sketch on disk at a time: the two that are kept, and the one being written.
SKETCH_FILES = 3


class BudgetError(RuntimeError):
    """Not enough host memory or disk, with the figures."""


@dataclass(frozen=True)
class Budget:
    """Bytes.

    Attributes:
        memory: host memory of one rank at the cut.
        trajectory: disk for the trajectory of all ranks.
        predictions: disk for the predicted checkpoints.
    """

    memory: int
    trajectory: int
    predictions: int


def change_between_rows(change_rate: float, observe_every: int) -> float:
    """Share of the bf16 weights that change from row to row: at most as many as in all the steps between them."""
    return min(1.0, change_rate * observe_every)


def budget(
    kind: Kind,
    rank_elements: int,
    all_elements: int,
    rows: int,
    predictions: int,
    change_rate: float = ASSUMED_CHANGE_RATE,
    tensors: int = 0,
) -> Budget:
    """Estimate the cost of a run.

    Args:
        kind: what is kept of the weights.
        rank_elements: parameters in one rank's shards.
        all_elements: parameters of the model.
        rows: observed steps up to the cut.
        predictions: checkpoints to be written.
        change_rate: share of the bf16 weights that change from row to row.
        tensors: L; their Gram matrices are held by every rank, twice while G is made from H.
    """
    rows_bytes, fixed = rows * kind.row_bytes(change_rate), kind.fixed_bytes
    gram = 2 * tensors * rows**2 * 8
    return Budget(
        memory=round(rank_elements * (kind.state_bytes + rows_bytes + fixed)) + gram,
        trajectory=round(all_elements * (rows_bytes + SKETCH_FILES * fixed)),
        predictions=predictions * all_elements * 2,
    )


def available_memory() -> int:
    """Bytes of host memory that can still be used: what the machine has, or less if this container is limited."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit == "max":
            return available
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(available, int(limit) - used + _file_cache())
    except (OSError, ValueError):  # not a cgroup-v2 host
        return available


def _file_cache() -> int:
    """Bytes of cached files: they count as used until somebody wants the memory."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))


def check_memory(need: int, available: int, ranks: int, reserved: int = 0) -> None:
    """Refuse a run whose ranks on this node would not fit.

    Args:
        need: bytes that the ranks on this node are still to take.
        available: bytes that the node has.
        ranks: on this node.
        reserved: bytes of these that the training itself will take later (an optimizer state that is kept on the host).

    Raises:
        BudgetError: with the figures and what to change.
    """
    if need + reserved > available:
        later = f", of which the optimizer will take {gib(reserved)}" if reserved else ""
        raise BudgetError(
            f"following this run takes about {gib(need)} of host memory on a node ({ranks} ranks), {gib(available)} are "
            f"available{later}: lower relex.t_cut, raise relex.observe_every, take relex.trajectory=bf16 or sketch, or run "
            "without RELEX"
        )


def check_disk(need: Budget, folder: Path) -> None:
    """Refuse a run whose files would not fit.

    Raises:
        BudgetError: with the figures and what to change.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    total = need.trajectory + need.predictions
    if total > free:
        raise BudgetError(
            f"relex.output_dir={folder} has {gib(free)} free, about {gib(total)} are needed ({gib(need.trajectory)} for "
            f"the trajectory, {gib(need.predictions)} for predicted checkpoints): choose another folder, fewer "
            "relex.targets, or an earlier relex.t_cut"
        )


def gib(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank moves.

    Attributes:
        observe: memory read at the last observed step (the most of any): weights, state, and all that is kept so far; for a
            sketch also written back.
        append: disk, written at every observed step; nothing for a sketch, which is stored at cuts and checkpoints.
        predict: memory read and written for one prediction at the cut.
    """

    observe: int
    append: int
    predict: int


def traffic(kind: Kind, rank_elements: int, rows: int, change_rate: float = ASSUMED_CHANGE_RATE) -> Traffic:
    """Estimate what a rank moves; divide by a bandwidth for a time.

    Args:
        kind: what is kept of the weights.
        rank_elements: parameters in one rank's shards.
        rows: observed steps up to the cut.
        change_rate: share of the bf16 weights that change from row to row.
    """
    row = rank_elements * kind.row_bytes(change_rate)
    state, fixed = rank_elements * kind.state_bytes, rank_elements * kind.fixed_bytes
    kept = rows * row + fixed
    return Traffic(round(2 * state + kept + fixed), round(row), round(state + kept + 2 * rank_elements))
