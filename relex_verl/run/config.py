"""Every key under `relex`, its meaning, and its check. A wrong key is refused before the first step, never ignored."""

import difflib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.extrapolators import METHODS
from relex_verl.maths.sketch import SIZES
from relex_verl.run.checks import ConfigError, is_list, is_number, is_whole, one_of, whole
from relex_verl.run.plan import USUAL_CUT, Plan, first
from relex_verl.trajectory.kinds import QUANTIZATIONS, TRAJECTORIES, Kind, kind_of

__all__ = ["ConfigError", "Plan", "RelexConfig"]


# What a run without a cut has no use for.
OF_CUTS = (
    "on_cut", "targets", "fit_from", "methods", "rank", "validate_targets", "max_candidates", "search_prompts",
    "confidence", "recut_every",
)  # fmt: skip
METRIC = re.compile(r"val-(core|aux)/.+/[^/]+/mean@\d+")


@dataclass(frozen=True)
class RelexConfig:
    """The `relex` node of a run's configuration.

    Attributes:
        t_cut: when to fit: a share of all steps if below 1, else a step; null: never, the run is only recorded.
        targets: what to predict: shares of all steps (up to 1.0) or steps (whole numbers above 1).
        trajectory: how weights are followed: "fp32" is the float32 master weights (where the engine has them, else
            "bf16"), "bf16" the bfloat16 weights that the rollout sees, exactly (the paper's own setting), "sketch" keeps
            moments of the float32 weights in memory that does not grow with the window, but no single row.
        quantization: how a row of an "fp32" trajectory is kept: "int8", "int4", or "none" (float32).
        sketch_size: r, how many polynomials over the steps a "sketch" keeps, 2 to 6.
        observe_every: steps between two rows; "auto" aims at 16 rows up to the cut for "fp32", takes each step for others.
        record: "window" keeps rows up to the last cut; "run" goes on to the end of the run, on disk alone.
        keep_best: write the weights of a step whose own validation scores more than any before to `output_dir/best`.
        fit_from: the first step that takes part in the fit; later than 1 leaves a learning-rate warm-up out.
        methods: names of extrapolators, see `relex_verl.maths.extrapolators.METHODS`.
        rank: r, directions kept a tensor.
        validate_targets: score the predictions in the run, on its own validation set; without it nothing is recommended.
        score_metric: the validation metric to decide on, "val-core/<data source>/<variable>/mean@<n>"; null takes the
            core metric of the first data source.
        max_candidates: validations that a cut may spend on predictions, besides the one of the last observed weights.
        search_prompts: prompts that a candidate is first scored on; those that are not told apart are scored on twice as
            many, and so on, and the winner on all. null for all at once.
        confidence: level of the paired test that a prediction has to pass, for all cuts of a run together.
        validation_timeout_s: seconds after which a validation counts as failed.
        rollout_timeout_s: seconds that the rollout may take to fall asleep, or to take weights, when RELEX asks it to; one
            that takes longer has died, and the run ends.
        overlap: observe beside the training: a step waits for a copy of the weights, in host memory, and for no more.
        max_overhead: share of the training's time that observing may hold it up, over 10 steps; above it rows become rarer,
            and then there are no more. null for no bound.
        on_cut: "advise" only tells; "stop" ends the run when the advice is to stop; "jump" sets the weights to the winner
            and trains on from there, cut after cut.
        recut_every: steps until the next cut after one that did not win; "auto" is as many as the first cut took.
        window: of "jump": steps from one cut to the next, each with rows of its own; "auto" is as many as the first took.
        max_jumps: of "jump": how many; null for no bound.
        jump_optimizer: of "jump": "keep" the optimizer's state, or "reset" it.
        jump_confidence: of "jump": level of the one-sided test that the winner is worse than the observed weights; one that
            is exactly as good is refused in a share 1 - jump_confidence of all cases.
        jump_kl_max: of "jump": mean token KL, in nats, between the policy before and after that a jump may have; null for no
            bound, and nothing is measured.
        jump_undo: of "jump": keep weights and optimizer state from before until the next cut, and go back if what was
            trained from the jump has fallen behind them by the same test.
        on_error: "disable" logs an error inside RELEX once and goes on training without it; "raise" stops the run.
        output_dir: where trajectory, predicted checkpoints and report go.
    """

    t_cut: float | None = USUAL_CUT
    targets: list[float] = field(default_factory=lambda: [1.0])
    trajectory: str = "fp32"
    quantization: str = "int8"
    sketch_size: int = 4
    observe_every: int | str = "auto"
    record: str = "window"
    keep_best: bool = False
    fit_from: int = 1
    methods: list[str] = field(default_factory=lambda: ["relex"])
    rank: int = 1
    validate_targets: bool = True
    score_metric: str | None = None
    max_candidates: int = 6
    search_prompts: int | None = None
    confidence: float = 0.95
    validation_timeout_s: float = 3600.0
    rollout_timeout_s: float = 1800.0
    overlap: bool = True
    max_overhead: float | None = 0.02
    on_cut: str = "advise"
    recut_every: int | str = "auto"
    window: int | str = "auto"
    max_jumps: int | None = None
    jump_optimizer: str = "keep"
    jump_confidence: float = 0.8
    jump_kl_max: float | None = None
    jump_undo: bool = True
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
        values: dict[str, Any] = {key: list(value) if is_list(value) else value for key, value in node.items()}
        config = cls(**values)
        config._check()
        keys = ("rank", "fit_from", "max_candidates", "search_prompts", "sketch_size")
        whole = {key: int(getattr(config, key)) for key in keys if getattr(config, key) is not None}
        return replace(config, **whole)  # type: ignore[arg-type]  # 2.0 is a whole number, but no index

    def _check(self) -> None:
        one_of("relex.trajectory", self.trajectory, TRAJECTORIES)
        one_of("relex.quantization", self.quantization, QUANTIZATIONS)
        one_of("relex.on_error", self.on_error, ["disable", "raise"])
        one_of("relex.on_cut", self.on_cut, ["advise", "stop", "jump"])
        self._check_cost()
        self._check_when()
        self._check_fit()
        self._check_sketch()
        self._check_scoring()
        self._check_jump()
        self._check_recording()

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

    def _check_cost(self) -> None:
        if not isinstance(self.overlap, bool):
            raise ConfigError("relex.overlap", self.overlap, "give true or false")
        if self.max_overhead is not None and not (is_number(self.max_overhead) and 0 < self.max_overhead < 1):
            raise ConfigError("relex.max_overhead", self.max_overhead, "give a share of a step's time, or null")

    def _check_when(self) -> None:
        if self.t_cut is not None and (not is_number(self.t_cut) or self.t_cut <= 0):
            raise ConfigError("relex.t_cut", self.t_cut, "give a share of all steps (0 to 1) or a step (1 or more)")
        if not is_list(self.targets) or not self.targets:
            raise ConfigError("relex.targets", self.targets, "give a list, e.g. [1.0] or [60,100]")
        for target in self.targets:
            if not is_number(target) or target <= 0:
                raise ConfigError("relex.targets", target, "give shares of all steps (up to 1.0) or steps")
        for key in ("observe_every", "recut_every", "window"):
            if getattr(self, key) != "auto":
                cure = "give auto or a whole number of steps, 1 or more"
                whole(f"relex.{key}", getattr(self, key), 1, cure)

    def _check_fit(self) -> None:
        if not is_list(self.methods) or not self.methods:
            raise ConfigError("relex.methods", self.methods, f"give a list of {', '.join(METHODS)}")
        for method in self.methods:
            one_of("relex.methods", method, list(METHODS))
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("relex.methods", self.methods, "name each method once")
        if not is_whole(self.rank) or self.rank < 1:
            raise ConfigError("relex.rank", self.rank, "give a whole number, 1 or more (the paper uses 1)")
        if not is_whole(self.fit_from) or self.fit_from < 0:
            raise ConfigError("relex.fit_from", self.fit_from, "give a step, 1 for all rows")
        if not isinstance(self.output_dir, str) or not self.output_dir:
            raise ConfigError("relex.output_dir", self.output_dir, "give a folder")

    def _check_scoring(self) -> None:
        if not isinstance(self.validate_targets, bool):
            raise ConfigError("relex.validate_targets", self.validate_targets, "give true or false")
        if self.score_metric is not None and not METRIC.fullmatch(str(self.score_metric)):
            cure = "give val-core/<data source>/<variable>/mean@<n>: prompts are paired by their mean over the samples"
            raise ConfigError("relex.score_metric", self.score_metric, cure)
        if not is_whole(self.max_candidates) or self.max_candidates < 1:
            raise ConfigError("relex.max_candidates", self.max_candidates, "give a whole number, 1 or more")
        if self.search_prompts is not None:
            cure = "give null for all prompts, or a whole number, 8 or more"
            whole("relex.search_prompts", self.search_prompts, 8, cure)
        if not is_number(self.confidence) or not 0.5 <= self.confidence < 1:
            raise ConfigError("relex.confidence", self.confidence, "give a level from 0.5 to below 1, e.g. 0.95")
        for key in ("validation_timeout_s", "rollout_timeout_s"):
            if not is_number(seconds := getattr(self, key)) or not 0 < seconds < threading.TIMEOUT_MAX:
                raise ConfigError(f"relex.{key}", seconds, "give seconds, more than 0")
        if self.on_cut != "advise" and not self.validate_targets:
            cure = "RELEX stops a run or jumps on validation scores only: set relex.validate_targets=true"
            raise ConfigError("relex.on_cut", self.on_cut, cure)

    def _check_jump(self) -> None:
        one_of("relex.jump_optimizer", self.jump_optimizer, ["keep", "reset"])
        if not is_number(self.jump_confidence) or not 0.5 <= self.jump_confidence < 1:
            raise ConfigError(
                "relex.jump_confidence", self.jump_confidence, "give a level from 0.5 to below 1, e.g. 0.8"
            )
        if self.jump_kl_max is not None and (not is_number(self.jump_kl_max) or self.jump_kl_max <= 0):
            cure = "give null for no bound, or nats a token, more than 0, e.g. 0.1"
            raise ConfigError("relex.jump_kl_max", self.jump_kl_max, cure)
        if not isinstance(self.jump_undo, bool):
            raise ConfigError("relex.jump_undo", self.jump_undo, "give true or false")
        if self.max_jumps is not None:
            whole("relex.max_jumps", self.max_jumps, 1, "give null for no bound, or a whole number, 1 or more")
        usual = RelexConfig()
        if self.on_cut != "jump":
            for key in ("window", "max_jumps", "jump_optimizer", "jump_confidence", "jump_kl_max", "jump_undo"):
                if getattr(self, key) != getattr(usual, key):
                    cure = f"only relex.on_cut=jump reads it, and relex.on_cut={self.on_cut}"
                    raise ConfigError(f"relex.{key}", getattr(self, key), cure)
            return
        if self.kind.dtype != torch.float32:
            cure = "a jump sets the float32 master weights: follow them, by relex.trajectory=fp32 or sketch"
            raise ConfigError("relex.trajectory", self.trajectory, cure)
        for key, instead in (("targets", "horizons are searched from 1.5 windows on"), ("recut_every", "relex.window")):
            if getattr(self, key) != getattr(usual, key):
                raise ConfigError(f"relex.{key}", getattr(self, key), f"leave it out with relex.on_cut=jump: {instead}")

    def _check_recording(self) -> None:
        one_of("relex.record", self.record, ["window", "run"])
        if not isinstance(self.keep_best, bool):
            raise ConfigError("relex.keep_best", self.keep_best, "give true or false")
        if self.record == "run" and not self.kind.keeps_rows:
            cure = "a sketch keeps no single row: record with relex.trajectory=bf16 or fp32"
            raise ConfigError("relex.record", self.record, cure)
        if self.t_cut is not None:
            return
        if self.record != "run":
            cure = "without a cut there is nothing to do but to record: set relex.record=run, or give a step"
            raise ConfigError("relex.t_cut", self.t_cut, cure)
        usual = RelexConfig()
        for key in OF_CUTS:
            if getattr(self, key) != getattr(usual, key):
                raise ConfigError(f"relex.{key}", getattr(self, key), "only a cut reads it, and relex.t_cut=null")

    def plan(self, total_steps: int, kind: Kind | None = None) -> Plan:
        """The first cut, see `plan.first`; there is one unless t_cut is null."""
        return first(self, total_steps, kind or self.kind)

    @property
    def kind(self) -> Kind:
        """What is kept of the weights, unless the engine does not allow it."""
        return kind_of(self.trajectory, self.quantization, self.sketch_size)

    @property
    def folder(self) -> Path:
        """output_dir as a path."""
        return Path(self.output_dir).expanduser().absolute()
