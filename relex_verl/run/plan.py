"""When to observe and when to cut: a configuration resolved against the length of one run."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from relex_verl.maths.extrapolators import METHODS
from relex_verl.run.checks import ConfigError, is_whole
from relex_verl.trajectory.kinds import Kind

__all__ = ["NEAREST_JUMP", "Plan", "Recording", "first", "following", "recording"]

# Shorter horizons are what a few more steps of training bring anyway.
NEAREST_JUMP = 1.5
USUAL_CUT = 0.15  # `relex.t_cut`


# A `config.RelexConfig`, which resolves itself by this file and so cannot be named here.
Config = Any


@dataclass(frozen=True)
class Plan:
    """The coming cut.

    Attributes:
        t_cut: the step at which to fit; the next one, once a cut has not won.
        targets: steps to predict, ascending.
        observe_every: steps between two observed rows.
        first: no row is taken before this step.
        origin: the step that rows are counted from, at which the window begins.
    """

    t_cut: int
    targets: list[int]
    observe_every: int
    first: int = 1
    origin: int = 0

    def observes(self, step: int) -> bool:
        """Whether a row is taken after this step: every `observe_every` steps, and always at the cut."""
        in_turn = (step - self.origin) % self.observe_every == 0
        return self.first <= step <= self.t_cut and (in_turn or step == self.t_cut)

    def rows_from(self, first: int) -> int:
        """Observed steps from `first` up to the cut."""
        return sum(self.observes(step) for step in range(max(1, first), self.t_cut + 1))

    @property
    def rows(self) -> int:
        """Observed steps up to the cut."""
        return self.rows_from(1)


@dataclass(frozen=True)
class Recording:
    """The rows after the last cut of a run that is recorded whole: they go to disk, and stay nowhere else.

    Attributes:
        last: the last step of the run, which is always observed.
        observe_every: steps between two rows.
    """

    last: int
    observe_every: int

    def observes(self, step: int) -> bool:
        """Whether a row is taken after this step."""
        return step == self.last or (0 < step < self.last and step % self.observe_every == 0)

    def thinner(self) -> "Recording":
        """Half as many rows."""
        return replace(self, observe_every=2 * self.observe_every)

    def rows_after(self, step: int) -> int:
        """Rows from the next step on."""
        return sum(map(self.observes, range(step + 1, self.last + 1)))


def recording(config: Config, total_steps: int, kind: Kind) -> Recording | None:
    """What is recorded after the last cut, as densely as up to the first; None where nothing is.

    Args:
        config: the `relex` node; without a cut, rows are spaced as for one at 15% of the steps, the default.
        total_steps: all steps of the run.
        kind: the one that the engine allows.
    """
    if config.record != "run":
        return None
    if config.observe_every != "auto":
        return Recording(total_steps, int(config.observe_every))
    share = USUAL_CUT if config.t_cut is None else config.t_cut
    return Recording(total_steps, kind.spacing(_step(share, total_steps, "relex.t_cut", share_below=1.0)))


def first(config: Config, total_steps: int, kind: Kind) -> Plan:
    """The first cut.

    Args:
        config: the `relex` node.
        total_steps: all steps of the run.
        kind: the one that the engine allows, where it is not the configured one.

    Raises:
        ConfigError: a cut outside the run or too early for the methods, a rank above the rows, a target not after the cut.
    """
    t_cut = _step(config.t_cut, total_steps, "relex.t_cut", share_below=1.0)
    if not 1 <= t_cut <= total_steps:
        cure = f"resolves to step {t_cut}, but the run has {total_steps}: give a step within 1..{total_steps}"
        raise ConfigError("relex.t_cut", config.t_cut, cure)
    if config.on_cut == "jump":
        if config.window != "auto":
            _checked(config, _window(config, kind, t_cut, t_cut + int(config.window)), "window")
        return _checked(config, _window(config, kind, 0, t_cut))
    targets = sorted({_target(target, t_cut, total_steps) for target in config.targets})
    every = kind.spacing(t_cut) if config.observe_every == "auto" else int(config.observe_every)
    # A sketch cannot leave out afterwards what it has added up.
    return _checked(config, Plan(t_cut, targets, every, 1 if kind.keeps_rows else max(1, config.fit_from)))


def following(config: Config, plan: Plan, first_cut: int, total_steps: int, kind: Kind) -> Plan | None:
    """The plan after a cut that did not win, with all rows so far; None when the run ends before the next cut.

    Rows that "auto" spaces out become four times as rare: they cost memory, and the window grows. A run that jumps has a
    window of its own for each cut instead.
    """
    between = config.window if config.on_cut == "jump" else config.recut_every
    t_cut = plan.t_cut + (first_cut if between == "auto" else int(between))
    if t_cut >= total_steps:
        return None
    if config.on_cut == "jump":
        return _window(config, kind, plan.t_cut, t_cut)
    every = plan.observe_every
    if kind.auto_rows is not None and config.observe_every == "auto" and plan.t_cut == first_cut:
        every *= 4
    later = [target for target in plan.targets if target > t_cut]
    return replace(plan, t_cut=t_cut, targets=later or [2 * t_cut], observe_every=every)


def _window(config: Config, kind: Kind, origin: int, t_cut: int) -> Plan:
    """A window of a run that jumps; its first target is where the search begins."""
    length = t_cut - origin
    every = kind.spacing(length) if config.observe_every == "auto" else int(config.observe_every)
    start = max(origin + 1, config.fit_from)
    return Plan(t_cut, [origin + ceil(NEAREST_JUMP * length)], every, start, origin)


def _checked(config: Config, plan: Plan, key: str = "t_cut") -> Plan:
    rows = plan.rows_from(config.fit_from)
    needed = max(METHODS[method].min_rows for method in config.methods)
    if rows < needed:
        have = (
            f"leaves {rows} observed steps from {config.fit_from} up to the cut, {list(config.methods)} need {needed}"
        )
        raise ConfigError(f"relex.{key}", getattr(config, key), f"{have}: cut later, or observe more often")
    if config.rank > rows:
        raise ConfigError(
            "relex.rank", config.rank, f"only {rows} steps are observed up to the cut: give at most {rows}"
        )
    return plan


def _target(target: float, t_cut: int, total_steps: int) -> int:
    step = _step(target, total_steps, "relex.targets", share_below=1.0 + 1e-9)
    if step <= t_cut:
        # 1 is the one number that could be both; as a target step it could never lie after a cut.
        cure = f"resolves to step {step}, which is not after the cut at {t_cut}: predict a later step, or cut earlier"
        raise ConfigError("relex.targets", target, cure)
    return step


def _step(value: float, total_steps: int, key: str, share_below: float) -> int:
    if value < share_below:
        return max(1, round(value * total_steps))
    if not is_whole(value):
        raise ConfigError(key, value, "steps are whole numbers; shares of all steps lie between 0 and 1")
    return int(value)
