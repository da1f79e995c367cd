"""What a trajectory's index.json says, and how steps are named to people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SCHEMA_VERSION", "TrajectoryError", "TrajectoryIndex", "Window", "step_ranges"]

SCHEMA_VERSION = 1


class TrajectoryError(RuntimeError):
    """A trajectory that is missing, damaged, or of another run."""


@dataclass
class Window:
    """A stretch of observation from one origin theta_0.

    Attributes:
        origin_step: the training step of theta_0.
        origin: "base" when theta_0 is the base model (in the encoding's dtype), "stored" when each rank holds its own copy.
        steps: the committed steps, ascending.
        stored: of a sketch: the steps whose files are kept, each a sketch of all steps up to it; empty for rows.
    """

    origin_step: int = 0
    origin: str = "base"
    steps: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)


@dataclass
class TrajectoryIndex:
    """What index.json says.

    Attributes:
        base_model: folder or Hub id of the base.
        encoding: how increments are kept.
        world_size: number of rank folders.
        tensors: name -> shape, in the order of the stacks (L, ...).
        aliases: tied name -> the name in `tensors` that holds its elements.
        run: what identifies the training run.
        windows: at least one.
    """

    base_model: str
    encoding: str
    world_size: int
    tensors: dict[str, list[int]]
    aliases: dict[str, str]
    run: dict[str, Any]
    windows: list[Window] = field(default_factory=lambda: [Window()])
    schema_version: int = SCHEMA_VERSION


def step_ranges(steps: Sequence[int]) -> str:
    """Step numbers for people: 1-5, 8, 10-12."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"
