"""What a trajectory's index.json says, in every schema that is read, and how steps are named to people."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.windows import WindowRecord, check_windows

__all__ = [
    "SCHEMA_VERSION",
    "TrajectoryError",
    "TrajectoryIndex",
    "WindowRecord",
    "read_index",
    "step_ranges",
    "write_index",
]

# 1 (0.1.0): one window, whose rank folders stand in the trajectory's own folder. 2: a folder for each window. 3: LoRA
# adapters. 4: tensors in kinds of their own. What has neither is written in schema 2 still, for the versions that know no
# other.
SCHEMA_VERSION = 4


class TrajectoryError(RuntimeError):
    """A trajectory that is missing, damaged, or of another run."""


@dataclass
class TrajectoryIndex:
    """What index.json says.

    Attributes:
        base_model: folder or Hub id of the base.
        encoding: name of its kind, see `kinds.KINDS`.
        world_size: number of rank folders of a window.
        tensors: name -> shape, in the order of the stacks (L, ...).
        aliases: tied name -> the name in `tensors` that holds its elements.
        run: what identifies the training run.
        windows: at least one, ascending origin steps.
        adapters: LoRA adapters of the base are followed; the folder `adapter` below has those before the first step, and
            what is written of them is laid out like it.
        schema_version: of the file; a trajectory of an older one is gone on with in its own.
        given_up: the steps at which windows began that do not count any more, since the run was resumed from before them.
        base_fingerprint: of the base model's tensors, see `fingerprint`; empty where it was not taken.
        ingested: of a finished run: step -> fingerprint of the files that it was recorded from.
        encodings: tensor -> name of its own kind, of those that are kept in another than `encoding`.
        requantized: how often quantised rows were quantised again, for ranks that cut the weights otherwise.
    """

    base_model: str
    encoding: str
    world_size: int
    tensors: dict[str, list[int]]
    aliases: dict[str, str]
    run: dict[str, Any]
    windows: list[WindowRecord] = field(default_factory=lambda: [WindowRecord()])
    adapters: bool = False
    schema_version: int = 2
    given_up: list[int] = field(default_factory=list)
    base_fingerprint: str = ""
    ingested: dict[str, str] = field(default_factory=dict)
    encodings: dict[str, str] = field(default_factory=dict)
    requantized: int = 0


def read_index(folder: Path) -> TrajectoryIndex:
    """The index of a trajectory, of schema 1 to 4.

    Raises:
        TrajectoryError: there is none, or one that this version cannot read.
    """
    path = folder / "index.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrajectoryError(f"{folder} holds no trajectory (no index.json)") from None
    except ValueError as error:
        raise TrajectoryError(f"{path} is damaged: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in range(1, SCHEMA_VERSION + 1):
        raise TrajectoryError(
            f"{folder} has schema version {version}, this relex-verl reads 1 to {SCHEMA_VERSION}: use the relex-verl that "
            "wrote it"
        )
    old = {"folder": "."} if version == 1 else {}
    try:
        windows = [WindowRecord(**{**old, **window}) for window in content.pop("windows")]
        index = TrajectoryIndex(**content, windows=windows)
    except (KeyError, TypeError, AttributeError) as error:
        raise TrajectoryError(f"{path} is damaged: {error}") from error
    if index.encoding not in list(KINDS) or not windows:
        raise TrajectoryError(f"{path} is damaged: encoding {index.encoding!r}, {len(windows)} windows")
    try:
        _check_encodings(index)
        check_windows(windows, index.given_up)
    except ValueError as error:
        raise TrajectoryError(f"{path} is damaged: {error}") from error
    return index


def _check_encodings(index: TrajectoryIndex) -> None:
    """Whether tensors in kinds of their own have such as keep rows, beside one that does; ValueError where not."""
    if not isinstance(index.encodings, dict) or not set(index.encodings) <= set(index.tensors):
        raise ValueError("encodings has to name observed tensors")
    rows = [name for name, kind in KINDS.items() if kind.keeps_rows]
    for encoding in (index.encoding, *index.encodings.values()) if index.encodings else ():
        if encoding not in rows:
            raise ValueError(f"tensors cannot be kept in several ways where one is {encoding!r}")


def write_index(folder: Path, index: TrajectoryIndex) -> None:
    """Put it on disk, in its own schema."""
    content = asdict(index)
    if index.adapters:
        content["schema_version"] = 3
    else:
        del content["adapters"]
    if index.encodings:
        content["schema_version"] = 4
    for key in ("given_up", "base_fingerprint", "ingested", "encodings", "requantized"):
        if not content[key]:
            del content[key]
    for window in content["windows"]:
        if index.schema_version == 1:
            del window["folder"]
        for key in ("jump", "undone"):  # said of those alone that began so
            if not window[key]:
                del window[key]
    write_json(folder / "index.json", content)


def step_ranges(steps: Sequence[int]) -> str:
    """Step numbers for people: 1-5, 8, 10-12."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"
