"""Whether a base model is the one that a trajectory was recorded with: increments on other weights give other weights."""

from functools import lru_cache
from pathlib import Path

from relex_verl.trajectory.fingerprint import of_tensors
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint, resolve_model
from relex_verl.trajectory.index import TrajectoryError, TrajectoryIndex

__all__ = ["check_base", "opened_base"]


def opened_base(folder: Path, index: TrajectoryIndex) -> BaseCheckpoint:
    """The base model of a trajectory, found by the path or Hub id in its index.

    Raises:
        TrajectoryError: it is not there, or not what it was when the trajectory was recorded.
    """
    cure = "give the one that this was recorded with as --base (base=)"
    try:
        base = BaseCheckpoint(resolve_model(index.base_model))
    except (FileNotFoundError, ValueError) as error:
        raise TrajectoryError(f"the base model of {folder} cannot be read: {error}. {cure}") from error
    try:
        check_base(index, base)
    except ValueError as error:
        raise TrajectoryError(f"{base.folder} is not the base model of {folder} any more: {error}. {cure}") from error
    return base


def check_base(index: TrajectoryIndex, base: BaseCheckpoint) -> None:
    """Compare names and shapes, and the fingerprint where one was taken.

    Raises:
        ValueError: what differs.
    """
    for name, shape in () if index.adapters else index.tensors.items():
        if name not in base.entries or list(base.entries[name].shape) != shape:
            there = list(base.entries[name].shape) if name in base.entries else "missing"
            raise ValueError(f"{name} was {shape}, and is {there}")
    if index.base_fingerprint and index.base_fingerprint != _fingerprint(base):
        raise ValueError("its weights are others, though their names are the same")


def _fingerprint(base: BaseCheckpoint) -> str:
    """Taken once for as long as the files stay as they are: one command opens its base several times."""
    files = sorted({entry.file for entry in base.entries.values()})
    stats = [(base.folder / file).stat() for file in files]
    return _of(str(base.folder), tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats))


@lru_cache(maxsize=4)
def _of(folder: str, state: tuple[tuple[int, int, int], ...]) -> str:
    return of_tensors(BaseCheckpoint(folder))
