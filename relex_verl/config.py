"""Every key under `relex`, its meaning, and its check. A wrong key is refused before the first step, never ignored."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from relex_verl.extrapolators import METHODS

__all__ = ["ConfigError", "Plan", "RelexConfig"]


class ConfigError(ValueError):
    """A key under `relex` (or a verl key that RELEX depends on) with a value that cannot work: key, value, cure."""

    def __init__(self, key: str, value: object, cure: str) -> None:
        super().__init__(f"{key}={value!r}: {cure}")
        self.key = key


@dataclass(frozen=True)
class Plan:
    """A configuration resolved against the length of the run.

    Attributes:
        t_cut: the step at which to fit.
        targets: steps to predict, ascending.
        observe_every: steps between two observed rows.
    """

    t_cut: int
    targets: list[int]
    observe_every: int

    def observes(self, step: int) -> bool:
        """Whether a row is taken after this step: every `observe_every` steps, and always at the cut."""
        return step <= self.t_cut and (step % self.observe_every == 0 or step == self.t_cut)


@dataclass(frozen=True)
class RelexConfig:
    """The `relex` node of a run's configuration.

    Attributes:
        t_cut: when to fit: a share of all steps if below 1, else a step.
        targets: what to predict: shares of all steps (up to 1.0) or steps (whole numbers above 1).
        trajectory: how weights are followed; "bf16" is the exact change of the bfloat16 weights.
        observe_every: steps between two rows; "auto" is every step.
        methods: names of extrapolators, see `relex_verl.extrapolators.METHODS`.
        rank: r, directions kept a tensor.
        on_error: "disable" logs an error inside RELEX once and goes on training without it; "raise" stops the run.
        output_dir: where trajectory, predicted checkpoints and report go.
    """

    t_cut: float = 0.15
    targets: list[float] = field(default_factory=lambda: [1.0])
    trajectory: str = "bf16"
    observe_every: int | str = "auto"
    methods: list[str] = field(default_factory=lambda: ["relex"])
    rank: int = 1
    on_error: str = "disable"
    output_dir: str = "${trainer.default_local_dir}/relex"

    @classmethod
    def from_mapping(cls, node: Mapping[str, Any]) -> "RelexConfig":
        """Check every key that does not depend on the run.

        Raises:
            ConfigError: an unknown key, or a value that cannot work.
        """
        known = [one.name for one in fields(cls)]
        for key, value in node.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean relex.{near[0]}?" if near else f"the keys are {', '.join(known)}"
                raise ConfigError(f"relex.{key}", value, f"unknown key; {hint}")
        config = cls(**{key: list(value) if _is_list(value) else value for key, value in node.items()})
        config._check()
        return config

    def _check(self) -> None:
        _one_of("relex.trajectory", self.trajectory, ["bf16"])
        _one_of("relex.on_error", self.on_error, ["disable", "raise"])
        if not _is_number(self.t_cut) or self.t_cut <= 0:
            raise ConfigError("relex.t_cut", self.t_cut, "give a share of all steps (0 to 1) or a step (1 or more)")
        if not _is_list(self.targets) or not self.targets:
            raise ConfigError("relex.targets", self.targets, "give a list, e.g. [1.0] or [60,100]")
        for target in self.targets:
            if not _is_number(target) or target <= 0:
                raise ConfigError("relex.targets", target, "give shares of all steps (up to 1.0) or steps")
        if self.observe_every != "auto" and (not _is_whole(self.observe_every) or int(self.observe_every) < 1):
            raise ConfigError(
                "relex.observe_every", self.observe_every, "give auto or a whole number of steps, 1 or more"
            )
        if not _is_list(self.methods) or not self.methods:
            raise ConfigError("relex.methods", self.methods, f"give a list of {', '.join(METHODS)}")
        for method in self.methods:
            _one_of("relex.methods", method, list(METHODS))
        if not _is_whole(self.rank) or self.rank < 1:
            raise ConfigError("relex.rank", self.rank, "give a whole number, 1 or more (the paper uses 1)")
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise ConfigError("relex.output_dir", self.output_dir, "give a folder")

    def plan(self, total_steps: int) -> Plan:
        """Resolve shares against the run.

        Args:
            total_steps: all steps of the run.

        Raises:
            ConfigError: a cut outside the run or too early for the methods, a rank above the rows, a target not after
                the cut.
        """
        t_cut = _step(self.t_cut, total_steps, "relex.t_cut", share_below=1.0)
        if not 1 <= t_cut <= total_steps:
            cure = f"resolves to step {t_cut}, but the run has {total_steps}: give a step within 1..{total_steps}"
            raise ConfigError("relex.t_cut", self.t_cut, cure)
        targets = sorted({self._target(target, t_cut, total_steps) for target in self.targets})
        every = 1 if self.observe_every == "auto" else int(self.observe_every)
        plan = Plan(t_cut, targets, every)
        rows = sum(plan.observes(step) for step in range(1, t_cut + 1))
        needed = max(METHODS[method].min_rows for method in self.methods)
        if rows < needed:
            cure = f"leaves {rows} observed steps up to the cut, {self.methods} need {needed}: cut later or observe more often"
            raise ConfigError("relex.t_cut", self.t_cut, cure)
        if self.rank > rows:
            raise ConfigError(
                "relex.rank", self.rank, f"only {rows} steps are observed up to the cut: give at most {rows}"
            )
        return plan

    def _target(self, target: float, t_cut: int, total_steps: int) -> int:
        step = _step(target, total_steps, "relex.targets", share_below=1.0 + 1e-9)
        if step <= t_cut:
            # 1 is the one number that could be both; as a target step it could never lie after a cut.
            cure = (
                f"resolves to step {step}, which is not after the cut at {t_cut}: predict a later step, or cut earlier"
            )
            raise ConfigError("relex.targets", target, cure)
        return step

    @property
    def folder(self) -> Path:
        """output_dir as a path."""
        return Path(self.output_dir).expanduser().absolute()


def _step(value: float, total_steps: int, key: str, share_below: float) -> int:
    if value < share_below:
        return max(1, round(value * total_steps))
    if not _is_whole(value):
        raise ConfigError(key, value, "steps are whole numbers; shares of all steps lie between 0 and 1")
    return int(value)


def _is_list(value: object) -> bool:
    return not isinstance(value, str) and hasattr(value, "__iter__") and not isinstance(value, Mapping)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124 (NaN)


def _is_whole(value: object) -> bool:
    return _is_number(value) and float(value) == int(value)  # type: ignore[arg-type]


def _one_of(key: str, value: object, allowed: list[str]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"give one of {', '.join(allowed)}")
