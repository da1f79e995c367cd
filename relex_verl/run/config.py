"""Every key under `relex`, its meaning, and its check. A wrong key is refused before the first step, never ignored."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import METHODS
from relex_verl.maths.sketch import SIZES
from relex_verl.trajectory.kinds import QUANTIZATIONS, TRAJECTORIES, Kind, kind_of

__all__ = ["ConfigError", "Plan", "RelexConfig"]


METRIC = re.compile(r"val-(core|aux)/.+/[^/]+/mean@\d+")


class ConfigError(ValueError):
    """A key under `relex` (or a verl key that RELEX depends on) with a value that cannot work: key, value, cure."""

    def __init__(self, key: str, value: object, cure: str) -> None:
        super().__init__(f"{key}={value!r}: {cure}")
        self.key = key


@dataclass(frozen=True)
class Plan:
    """A configuration resolved against the length of the run.

    Attributes:
        t_cut: the step at which to fit; the next one, once a cut has not won.
        targets: steps to predict, ascending.
        observe_every: steps between two observed rows.
        first: no row is taken before this step.
    """

    t_cut: int
    targets: list[int]
    observe_every: int
    first: int = 1

    def observes(self, step: int) -> bool:
        """Whether a row is taken after this step: every `observe_every` steps, and always at the cut."""
        return self.first <= step <= self.t_cut and (step % self.observe_every == 0 or step == self.t_cut)

    def rows_from(self, first: int) -> int:
        """Observed steps from `first` up to the cut."""
        return sum(self.observes(step) for step in range(max(1, first), self.t_cut + 1))

    @property
    def rows(self) -> int:
        """Observed steps up to the cut."""
        return self.rows_from(1)


@dataclass(frozen=True)
class RelexConfig:
    """The `relex` node of a run's configuration.

    Attributes:
        t_cut: when to fit: a share of all steps if below 1, else a step.
        targets: what to predict: shares of all steps (up to 1.0) or steps (whole numbers above 1).
        trajectory: how weights are followed: "fp32" is the float32 master weights (where the engine has them, else
            "bf16"), "bf16" the bfloat16 weights that the rollout sees, exactly (the paper's own setting), "sketch" keeps
            moments of the float32 weights in memory that does not grow with the window, but no single row.
        quantization: how a row of an "fp32" trajectory is kept: "int8", "int4", or "none" (float32).
        sketch_size: r, how many polynomials over the steps a "sketch" keeps, 2 to 6.
        observe_every: steps between two rows; "auto" aims at 16 rows up to the cut for "fp32", takes each step for others.
        fit_from: the first step that takes part in the fit; later than 1 leaves a learning-rate warm-up out.
        methods: names of extrapolators, see `relex_verl.maths.extrapolators.METHODS`.
        rank: r, directions kept a tensor.
        validate_targets: score the predictions in the run, on its own validation set; without it nothing is recommended.
        score_metric: the validation metric to decide on, "val-core/<data source>/<variable>/mean@<n>"; null takes the
            core metric of the first data source.
        max_candidates: validations that a cut may spend on predictions, besides the one of the last observed weights.
        confidence: level of the paired test that a prediction has to pass, for all cuts of a run together.
        validation_timeout_s: seconds after which a validation counts as failed.
        on_cut: "advise" only tells; "stop" ends the run when the advice is to stop.
        recut_every: steps until the next cut after one that did not win; "auto" is as many as the first cut took.
        on_error: "disable" logs an error inside RELEX once and goes on training without it; "raise" stops the run.
        output_dir: where trajectory, predicted checkpoints and report go.
    """

    t_cut: float = 0.15
    targets: list[float] = field(default_factory=lambda: [1.0])
    trajectory: str = "fp32"
    quantization: str = "int8"
    sketch_size: int = 4
    observe_every: int | str = "auto"
    fit_from: int = 1
    methods: list[str] = field(default_factory=lambda: ["relex"])
    rank: int = 1
    validate_targets: bool = True
    score_metric: str | None = None
    max_candidates: int = 6
    confidence: float = 0.95
    validation_timeout_s: float = 3600.0
    on_cut: str = "advise"
    recut_every: int | str = "auto"
    on_error: str = "disable"
    output_dir: str = "${trainer.default_local_dir}/relex"

    @classmethod
    def from_mapping(cls, node: Mapping[str, Any]) -> "RelexConfig":
        """Check every key that does not depend on the run.

        Raises:
            ConfigError: an unknown key, or a value that cannot work.
        """
        known = [key.name for key in fields(cls)]
        for key, value in node.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean relex.{near[0]}?" if near else f"the keys are {', '.join(known)}"
                raise ConfigError(f"relex.{key}", value, f"unknown key; {hint}")
        values: dict[str, Any] = {key: list(value) if _is_list(value) else value for key, value in node.items()}
        config = cls(**values)
        config._check()
        whole = {key: int(getattr(config, key)) for key in ("rank", "fit_from", "max_candidates", "sketch_size")}
        return replace(config, **whole)  # type: ignore[arg-type]  # 2.0 is a whole number, but no index

    def _check(self) -> None:
        _one_of("relex.trajectory", self.trajectory, TRAJECTORIES)
        _one_of("relex.quantization", self.quantization, QUANTIZATIONS)
        _one_of("relex.on_error", self.on_error, ["disable", "raise"])
        _one_of("relex.on_cut", self.on_cut, ["advise", "stop"])
        self._check_when()
        self._check_fit()
        self._check_sketch()
        self._check_scoring()

    def _check_sketch(self) -> None:
        if self.sketch_size not in SIZES:
            cure = f"give a whole number from {SIZES.start} to {SIZES.stop - 1}"
            raise ConfigError("relex.sketch_size", self.sketch_size, cure)
        for method in self.methods:
            if method not in self.kind.methods:
                cure = f"a sketch keeps no single row: with relex.trajectory=sketch use {', '.join(self.kind.methods)}"
                raise ConfigError("relex.methods", method, cure)
        if not self.kind.keeps_rows and self.rank > self.kind.size:
            raise ConfigError("relex.rank", self.rank, f"relex.sketch_size={self.sketch_size} holds no more directions")

    def _check_when(self) -> None:
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
        if self.recut_every != "auto" and (not _is_whole(self.recut_every) or int(self.recut_every) < 1):
            raise ConfigError("relex.recut_every", self.recut_every, "give auto or a whole number of steps, 1 or more")

    def _check_fit(self) -> None:
        if not _is_list(self.methods) or not self.methods:
            raise ConfigError("relex.methods", self.methods, f"give a list of {', '.join(METHODS)}")
        for method in self.methods:
            _one_of("relex.methods", method, list(METHODS))
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("relex.methods", self.methods, "name each method once")
        if not _is_whole(self.rank) or self.rank < 1:
            raise ConfigError("relex.rank", self.rank, "give a whole number, 1 or more (the paper uses 1)")
        if not _is_whole(self.fit_from) or self.fit_from < 0:
            raise ConfigError("relex.fit_from", self.fit_from, "give a step, 1 for all rows")
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise ConfigError("relex.output_dir", self.output_dir, "give a folder")

    def _check_scoring(self) -> None:
        if not isinstance(self.validate_targets, bool):
            raise ConfigError("relex.validate_targets", self.validate_targets, "give true or false")
        if self.score_metric is not None and not METRIC.fullmatch(str(self.score_metric)):
            cure = "give val-core/<data source>/<variable>/mean@<n>: prompts are paired by their mean over the samples"
            raise ConfigError("relex.score_metric", self.score_metric, cure)
        if not _is_whole(self.max_candidates) or self.max_candidates < 1:
            raise ConfigError("relex.max_candidates", self.max_candidates, "give a whole number, 1 or more")
        if not _is_number(self.confidence) or not 0.5 <= self.confidence < 1:
            raise ConfigError("relex.confidence", self.confidence, "give a level from 0.5 to below 1, e.g. 0.95")
        if not _is_number(self.validation_timeout_s) or self.validation_timeout_s <= 0:
            raise ConfigError("relex.validation_timeout_s", self.validation_timeout_s, "give seconds, more than 0")
        if self.on_cut == "stop" and not self.validate_targets:
            cure = "RELEX stops a run on validation scores only: set relex.validate_targets=true"
            raise ConfigError("relex.on_cut", self.on_cut, cure)

    def plan(self, total_steps: int, kind: Kind | None = None) -> Plan:
        """Resolve shares against the run.

        Args:
            total_steps: all steps of the run.
            kind: the one that the engine allows, where it is not the configured one.

        Raises:
            ConfigError: a cut outside the run or too early for the methods, a rank above the rows, a target not after
                the cut.
        """
        t_cut = _step(self.t_cut, total_steps, "relex.t_cut", share_below=1.0)
        if not 1 <= t_cut <= total_steps:
            cure = f"resolves to step {t_cut}, but the run has {total_steps}: give a step within 1..{total_steps}"
            raise ConfigError("relex.t_cut", self.t_cut, cure)
        targets = sorted({self._target(target, t_cut, total_steps) for target in self.targets})
        kind = kind or self.kind
        every = kind.spacing(t_cut) if self.observe_every == "auto" else int(self.observe_every)
        # A sketch cannot leave out afterwards what it has added up.
        plan = Plan(t_cut, targets, every, 1 if kind.keeps_rows else max(1, self.fit_from))
        rows = plan.rows_from(self.fit_from)
        needed = max(METHODS[method].min_rows for method in self.methods)
        if rows < needed:
            have = (
                f"leaves {rows} observed steps from {self.fit_from} up to the cut, {list(self.methods)} need {needed}"
            )
            raise ConfigError("relex.t_cut", self.t_cut, f"{have}: cut later, or observe more often")
        if self.rank > rows:
            cure = f"only {rows} steps are observed up to the cut: give at most {rows}"
            raise ConfigError("relex.rank", self.rank, cure)
        return plan

    def next_plan(self, plan: Plan, first_cut: int, total_steps: int, kind: Kind) -> Plan | None:
        """The plan after a cut that did not win, with all rows so far; None when the run ends before the next cut.

        Rows that "auto" spaces out become four times as rare: they cost memory, and the window grows.
        """
        t_cut = plan.t_cut + (first_cut if self.recut_every == "auto" else int(self.recut_every))
        if t_cut >= total_steps:
            return None
        every = plan.observe_every
        if kind.auto_rows is not None and self.observe_every == "auto" and plan.t_cut == first_cut:
            every *= 4
        later = [target for target in plan.targets if target > t_cut]
        return replace(plan, t_cut=t_cut, targets=later or [2 * t_cut], observe_every=every)

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
    def kind(self) -> Kind:
        """What is kept of the weights, unless the engine does not allow it."""
        return kind_of(self.trajectory, self.quantization, self.sketch_size)

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
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_whole(value: object) -> bool:
    return isinstance(value, int | float) and _is_number(value) and math.isfinite(value) and value == int(value)


def _one_of(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(key, value, f"give one of {', '.join(allowed)}")
