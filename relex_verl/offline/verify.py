"""Whether all of a trajectory is there, and is what was written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from relex_verl.trajectory.checksum import KEY, checksum
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import ADAPTER_FOLDER, FILES_FOLDER, Trajectory

__all__ = ["Verified", "verify"]


@dataclass
class Verified:
    """What was found.

    Attributes:
        files: how many were read.
        damaged: file, or what is missing -> what is wrong with it.
        unchecked: files without a checksum, of version 0.1.0; they can be read.
        unexplained: files that no run counts or has named.
        whole_until: window -> the last step up to which its steps can be used; None where not even its origin can.
    """

    files: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    whole_until: dict[int, int | None] = field(default_factory=dict)


def verify(folder: Path, base: str | None = None, progress: Callable[[int], object] = lambda files: None) -> Verified:
    """Read every file of a trajectory, and compare it with its checksum.

    Args:
        folder: of the trajectory.
        base: where its base model is now, if it was moved.
        progress: called with 1 after each file of a step.

    Raises:
        TrajectoryError: its index cannot be read: without it nothing can be said of the rest.
    """
    opened, found = Trajectory(folder, base=base), Verified(files=1)
    known = {folder / "index.json"}
    try:
        opened.base()
    except TrajectoryError as error:
        found.damaged["the base model"] = str(error)
    for number in range(len(opened.windows)):
        window = opened.of_window(number)
        usable = _beginning(window, found, known)
        last: int | None = window.record.origin_step if usable else None
        for step in window.steps if window.kind.keeps_rows else window.record.stored:
            whole = True
            for rank in range(window.index.world_size):
                path = window.step_file(rank, step)
                known.add(path)
                whole &= _read(path, found, _finite)
                progress(1)
            if whole and usable:
                last = step
            usable &= whole or not window.kind.keeps_rows  # each file of a sketch stands for all steps up to its own
        found.whole_until[number] = last
    for path in (folder / ADAPTER_FOLDER).glob("*.safetensors"):
        _read(path, found)
    known |= {path for place in (ADAPTER_FOLDER, FILES_FOLDER) for path in (folder / place).rglob("*")}
    left = (path for path in folder.rglob("*") if path.is_file() and path not in known)
    found.unexplained = sorted(str(path.relative_to(folder)) for path in left)
    return found


def _beginning(window: Trajectory, found: Verified, known: set[Path]) -> bool:
    """Look at the placements of all ranks, which together have every element once, and at a stored origin; whether a window
    can be used at all."""
    before = len(found.damaged)
    counted = dict.fromkeys(window.names, 0)
    for rank in range(window.index.world_size):
        path, held = window.rank_folder(rank) / "placements.json", 0
        try:
            for name, placement in window.placements(rank).items():
                if name not in counted:
                    raise TrajectoryError(f"{path} is damaged: {name} is none of the observed tensors")
                counted[name] += placement.numel
                held += placement.numel
        except TrajectoryError as error:
            found.damaged[str(path)] = str(error)
        found.files += 1
        known.add(path)
        if window.record.origin == "stored":
            origin = window.rank_folder(rank) / "origin.safetensors"
            known.add(origin)
            _read(origin, found, partial(_as_long_as, held))
    for name, shape in window.index.tensors.items() if len(found.damaged) == before else ():
        if counted[name] != prod(shape):
            said = f"the ranks hold {counted[name]} elements of its {prod(shape)}"
            found.damaged[f"{name} in window {window.number}"] = said
    return len(found.damaged) == before


Arrays = Mapping[str, torch.Tensor]


def _finite(arrays: Arrays) -> None:
    if not arrays["gram_row"].isfinite().all():
        raise ValueError("holds inner products that are not finite")


def _as_long_as(elements: int, arrays: Arrays) -> None:
    if arrays["origin"].numel() != elements:
        raise ValueError(f"holds {arrays['origin'].numel()} of {elements} elements")


def _read(path: Path, found: Verified, check: Callable[[Arrays], None] = lambda arrays: None) -> bool:
    """Compare a file with its checksum, and look into it; whether it can be used."""
    found.files += 1
    try:
        with safe_open(path, framework="pt") as handle:
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            said = (handle.metadata() or {}).get(KEY)
            check(arrays)
            if said is not None and said != (now := checksum(arrays)):
                raise ValueError(f"its content is not what was written (checksum {now}, not {said})")
    except Exception as error:
        found.damaged[str(path)] = str(error).strip("'") if path.exists() else "is missing"
        return False
    if said is None:
        found.unchecked.append(str(path))
    return True
