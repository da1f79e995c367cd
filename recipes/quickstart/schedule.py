"""How many steps to train, where to cut, and which steps to predict."""

from dataclasses import dataclass

DEFAULT_STEPS = 200
CUT_SHARE = 0.15
JUMP_SHARE = 0.1
"""Of the steps, from one cut to the next, for a run that jumps."""
TARGET_SHARES = (0.3, 0.5, 0.75, 1.0)
MIN_CUT = 3
"""A line and its diagnostics need at least three observed steps."""


@dataclass(frozen=True)
class Schedule:
    """A resolved schedule, in training steps."""

    steps: int
    cut: int
    targets: tuple[int, ...]
    full: bool
    jump: bool = False

    @property
    def trained(self) -> int:
        """How far the run really trains."""
        return self.steps if self.full else self.cut


def resolve(steps: int, t_cut: float | None, targets: str | None, full: bool, jump: bool = False) -> Schedule:
    """Fill in what was not asked for, in proportion to the run's length.

    Raises:
        ValueError: a cut or a target that makes no sense, with the cure.
    """
    if t_cut is None:
        t_cut = JUMP_SHARE if jump else CUT_SHARE
    cut = max(MIN_CUT, round(t_cut * steps)) if t_cut < 1 else int(t_cut)
    if not 1 <= cut <= steps:
        raise ValueError(f"--t-cut {t_cut:g} is step {cut}, but the run has {steps} steps: give 1 to {steps}")
    if jump:
        if targets is not None:
            raise ValueError(f"--targets {targets}: leave it out with --jump, which searches its horizons itself")
        return Schedule(steps, cut, (), full=True, jump=True)
    if targets is None:
        chosen = sorted({round(share * steps) for share in TARGET_SHARES if round(share * steps) > cut}) or [2 * cut]
    else:
        chosen = [_target(text, steps) for text in targets.split(",")]
    early = [target for target in chosen if target <= cut]
    if early:
        raise ValueError(f"--targets {early[0]} is not after the cut at step {cut}: give later steps, or cut earlier")
    return Schedule(steps, cut, tuple(chosen), full)


def _target(text: str, steps: int) -> int:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--targets: {text!r} is not a number: give steps or shares, e.g. 60,100 or 0.5,1.0") from None
    return round(value * steps) if value < 1 or "." in text else int(value)
