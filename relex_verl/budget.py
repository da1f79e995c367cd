"""What following a run costs in host memory and disk, and whether the machine has it: asked before the first step."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from relex_verl.encodings import Encoding

__all__ = [
    "ASSUMED_CHANGE_RATE",
    "Budget",
    "BudgetError",
    "Traffic",
    "available_memory",
    "budget",
    "check_disk",
    "check_memory",
    "traffic",
]

# Share of the bf16 weights that change from one RL step to the next: 0.5-3 % as published for RL of language models
# (verl's delta-sync measurements; PULSE, arXiv:2602.03839), so that 3 % is on the safe side.
ASSUMED_CHANGE_RATE = 0.03


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


def budget(
    encoding: Encoding,
    rank_elements: int,
    all_elements: int,
    rows: int,
    predictions: int,
    change_rate: float = ASSUMED_CHANGE_RATE,
) -> Budget:
    """Estimate the cost of a run.

    Args:
        encoding: how increments are kept.
        rank_elements: parameters in one rank's shards.
        all_elements: parameters of the model.
        rows: observed steps up to the cut.
        predictions: checkpoints to be written.
        change_rate: share of the bf16 weights that change from row to row.
    """
    row_bytes = encoding.row_bytes(change_rate)
    return Budget(
        memory=round(rank_elements * (encoding.state_bytes + rows * row_bytes)),
        trajectory=round(all_elements * rows * row_bytes),
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


def check_memory(need: int, available: int, ranks: int) -> None:
    """Refuse a run whose ranks on this node would not fit.

    Raises:
        BudgetError: with both figures and what to change.
    """
    if need > available:
        raise BudgetError(
            f"following this run needs about {_gib(need)} of host memory on a node ({ranks} ranks), {_gib(available)} are "
            "available: lower relex.t_cut, raise relex.observe_every, or run without RELEX"
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
            f"relex.output_dir={folder} has {_gib(free)} free, about {_gib(total)} are needed ({_gib(need.trajectory)} for "
            f"the trajectory, {_gib(need.predictions)} for predicted checkpoints): choose another folder, fewer "
            "relex.targets, or an earlier relex.t_cut"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank moves.

    Attributes:
        observe: memory read at the last observed step (the most of any): weights, the row before, and all rows so far.
        append: disk, written at every observed step.
        predict: memory read and written for one prediction at the cut.
    """

    observe: int
    append: int
    predict: int


def traffic(encoding: Encoding, rank_elements: int, rows: int, change_rate: float = ASSUMED_CHANGE_RATE) -> Traffic:
    """Estimate what a rank moves; divide by a bandwidth for a time.

    Args:
        encoding: how increments are kept.
        rank_elements: parameters in one rank's shards.
        rows: observed steps up to the cut.
        change_rate: share of the bf16 weights that change from row to row.
    """
    row = rank_elements * encoding.row_bytes(change_rate)
    state = rank_elements * encoding.state_bytes
    return Traffic(round(2 * state + rows * row), round(row), round(state + rows * row + 2 * rank_elements))
