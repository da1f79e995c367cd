"""Whether all of a trajectory is there, and is what was written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

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
        before = len(found.damaged)
        for path, expected in _beginning(window, found):
            known.add(path)
            _read(path, expected, found)
        usable = len(found.damaged) == before
        last: int | None = window.record.origin_step if usable else None
        steps = window.steps if window.kind.keeps_rows else window.record.stored
        for step in steps:
            for rank in range(window.index.world_size):
                path = window.step_file(rank, step)
                known.add(path)
                usable &= _read(path, None, found)
                progress(1)
            if usable:
                last = step
        found.whole_until[number] = last
    found.unexplained = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and path not in known
        and path.relative_to(folder).parts[0] not in (ADAPTER_FOLDER, FILES_FOLDER)
    )
    return found


def _beginning(window: Trajectory, found: Verified) -> Iterator[tuple[Path, int | None]]:
    """Placements of all ranks, which together have every element once; files of a stored origin, with their length."""
    counted = dict.fromkeys(window.names, 0)
    complete = True
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
            complete = False
            continue
        found.files += 1
        yield path, None
        if window.record.origin == "stored":
            yield window.rank_folder(rank) / "origin.safetensors", held
    for name, shape in window.index.tensors.items() if complete else ():
        if counted[name] != prod(shape):
            said = f"the ranks hold {counted[name]} elements of its {prod(shape)}"
            found.damaged[f"{name} in window {window.number}"] = said


def _read(path: Path, origin: int | None, found: Verified) -> bool:
    """Look into a file; whether it can be used. An origin has so many elements."""
    if path.suffix == ".json":
        return True
    found.files += 1
    try:
        with safe_open(path, framework="pt") as handle:
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            said = (handle.metadata() or {}).get(KEY)
            if origin is not None and arrays["origin"].numel() != origin:
                raise ValueError(f"holds {arrays['origin'].numel()} of {origin} elements")
            if origin is None and not arrays["gram_row"].isfinite().all():
                raise ValueError("holds inner products that are not finite")
            if said is not None and said != checksum(arrays):
                raise ValueError(f"its content is not what was written (checksum {checksum(arrays)}, not {said})")
    except Exception as error:
        missing = "is missing" if not path.exists() else str(error).strip("'")
        found.damaged[str(path)] = missing
        return False
    if said is None:
        found.unchecked.append(str(path))
    return True
