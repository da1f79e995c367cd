"""The windows of a trajectory, as its index keeps them, and what no run writes about them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from relex_verl.maths.extrapolators import METHODS

__all__ = ["WindowRecord", "check_windows", "next_folder"]

FOLDER = re.compile(r"\.|window_\d{3,}")
JUMP = ("method", "target", "rank", "fit_from", "optimizer")


@dataclass
class WindowRecord:
    """A stretch of observation from one origin theta_0, as the index keeps it.

    Attributes:
        origin_step: the training step of theta_0.
        origin: "base" when theta_0 is the base model (in the kind's dtype), "stored" when each rank holds its own copy.
        steps: the committed steps, ascending.
        stored: of a sketch: the steps whose files are kept, each a sketch of all steps up to it; empty for rows.
        folder: of its rank folders, below the trajectory's.
        jump: the prediction from the window before whose weights are theta_0: its `method`, `target`, `rank` and
            `fit_from`, and `optimizer`, whether its state was kept ("keep") or begun anew ("reset"). None: theta_0 are
            the weights of the origin step as they were trained.
        undone: theta_0 are the weights before an earlier jump, which was undone.
    """

    origin_step: int = 0
    origin: str = "base"
    steps: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)
    folder: str = "window_000"
    jump: dict[str, Any] | None = None
    undone: bool = False

    @property
    def last(self) -> int:
        """The last step whose weights it knows."""
        return self.steps[-1] if self.steps else self.origin_step


def next_folder(taken: Sequence[str]) -> str:
    """A window's folder beyond those that are taken."""
    numbers = [int(folder.removeprefix("window_")) for folder in taken if folder != "."]
    return f"window_{max(numbers, default=len(taken) - 1) + 1:03d}"


def check_windows(windows: Sequence[WindowRecord], given_up: Sequence[int] = ()) -> None:
    """Refuse what no run writes: the file may be somebody else's.

    Args:
        windows: in their order.
        given_up: see `TrajectoryIndex`.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(given_up, list | tuple) or not all(map(_is_step, given_up)):
        raise ValueError(f"given_up has to be a list of steps, not {str(given_up)[:80]}")
    for number, window in enumerate(windows):
        try:
            _check(window, windows[:number])
        except TypeError as error:  # something else than a number, a text or a list where one has to be
            raise ValueError(f"window {number}: {error}") from None


def _check(window: WindowRecord, before: Sequence[WindowRecord]) -> None:
    folder, origin_step = window.folder, window.origin_step
    # It must not lead out of the trajectory, and is deleted when a run resumes from before the window.
    taken = bool(before) and folder in [".", *(other.folder for other in before)]
    if taken or not FOLDER.fullmatch(folder):
        raise ValueError(f"a window's folder cannot be {folder!r}")
    if window.origin not in ("base", "stored"):
        raise ValueError(f"the origin of {folder} cannot be {window.origin!r}")
    known, lists = [origin_step, *window.steps], (window.steps, window.stored)
    steps = all(map(_is_step, known)) and all(isinstance(one, list) for one in lists)
    if not steps or any(late <= early for early, late in pairwise(known)):
        raise ValueError(f"the steps of {folder} do not ascend from its origin at {origin_step!r}")
    if not set(window.stored) <= set(window.steps):
        raise ValueError(f"{folder} has stored steps that are not among its steps")
    if before and origin_step < before[-1].last:
        last = before[-1].last
        raise ValueError(f"a window cannot begin at step {origin_step}: the one before it goes up to step {last}")
    if window.jump is not None:
        _check_jump(window.jump, origin_step)
    if type(window.undone) is not bool or (window.undone and window.jump is not None):
        raise ValueError(f"{folder} begins with a jump, with the undoing of one, or with neither")
    if not before and (window.undone or window.jump is not None):
        raise ValueError(f"{folder} is the first, and can begin neither with a jump nor with the undoing of one")


def _check_jump(jump: Any, origin_step: int) -> None:
    if not isinstance(jump, dict) or sorted(jump) != sorted(JUMP):
        raise ValueError(f"a jump has to say {', '.join(JUMP)}, not {str(jump)[:80]}")
    method, target, rank, fit_from, optimizer = (jump[key] for key in JUMP)
    if method not in METHODS or optimizer not in ("keep", "reset"):
        raise ValueError(f"a jump cannot have method {str(method)[:80]!r} and optimizer {str(optimizer)[:80]!r}")
    if not all(map(_is_step, (target, rank, fit_from))) or rank < 1 or target <= origin_step:
        raise ValueError(
            f"a jump at step {origin_step} cannot have target {target!r}, rank {rank!r}, fit_from {fit_from!r}"
        )


def _is_step(value: Any) -> bool:
    return type(value) is int and value >= 0
