"""What is found at a cut: by rank 0 in the window, and all of it with scores and advice, as report.json says it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relex_verl.maths.advice import Advice
from relex_verl.reporting.provenance import Provenance
from relex_verl.reporting.records import IF_KNOWN, Record

__all__ = ["Cost", "CutReport", "EarlierCut", "Findings", "Fits", "Predicted", "Scored"]


@dataclass(frozen=True)
class Fits:
    """How low-rank and how straight the tensors' paths are.

    Attributes:
        summary: figure -> statistic -> value over the tensors.
        random_walk_null: figure -> what a pure random walk over the same steps shows.
        tensors: a row each: `tensor`, `shape`, `delta_norm` and the figures, None where one is not defined.
    """

    summary: dict[str, dict[str, float]]
    random_walk_null: dict[str, float]
    tensors: list[dict[str, Any]]


@dataclass(frozen=True)
class Findings:
    """What rank 0 finds in the window of a cut, before anything is scored.

    Attributes:
        steps: the observed ones.
        origin_step: where they are counted from.
        fits: of all tensors.
        backtests: method -> error of predicting the last row from the first half, against holding; NaN where unknown.
        drift: 1 - |cos| of v1 between the first half of the rows and all, mean over the tensors; NaN where unknown.
        agreement: |cos| of v1 between the two halves, mean over the tensors; NaN where unknown.
        figures: pictures of the window, name -> PNG file.
    """

    steps: list[int]
    origin_step: int
    fits: Fits
    backtests: dict[str, float]
    drift: float
    agreement: float
    figures: dict[str, Path]


@dataclass(frozen=True)
class Scored:
    """Some weights and their validation: a row of the curve that the advice rests on.

    Attributes:
        name: observed-step_<t_cut>, or that of the prediction's folder.
        method: None for the observed weights.
        target: the step that was predicted; the cut for the observed weights.
        metric: name of the one that is decided on.
        score: its value.
        standard_error: of the score, from its spread over the prompts.
        search_score: on the half of the prompts that the search saw; None where it saw none.
        prompts: how many came back.
        seconds: what the validation cost.
        metrics: all that the host's validation gave.
        samples: that were generated for it; None where nobody has said.
    """

    name: str
    method: str | None
    target: int
    metric: str
    score: float
    standard_error: float
    search_score: float | None
    prompts: int
    seconds: float
    metrics: dict[str, float]
    samples: int | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True)
class Cost:
    """What scoring took.

    Attributes:
        validations: how many.
        samples: generated for them.
        seconds: the updates of the rollout's weights included.
        steps: training steps that generate as many samples; None where nobody has said how many one has. They would take
            longer than the scoring did: a training step also learns from its samples.
    """

    validations: int
    samples: int
    seconds: float
    steps: float | None

    @classmethod
    def of(cls, scored: Sequence[Scored], samples_a_step: int | None) -> "Cost":
        """Of some validations; a prompt counts as one sample where nobody has said how many it had."""
        samples = sum(row.prompts if row.samples is None else row.samples for row in scored)
        steps = None if samples_a_step is None else samples / samples_a_step
        return cls(len(scored), samples, sum(row.seconds for row in scored), steps)


@dataclass(frozen=True, kw_only=True)
class Predicted(Provenance):
    """A predicted checkpoint that was written at the cut: where it is, and what its `relex.json` says."""

    path: str

    @classmethod
    def at(cls, folder: Path, provenance: Provenance) -> "Predicted":
        """With its place."""
        return cls(**vars(provenance), path=str(folder))


@dataclass(frozen=True)
class EarlierCut:
    """What later reports say of a cut.

    Attributes:
        t_cut, advice, validation_scores, screened_out, origin_step, rewards: see `CutReport`.
    """

    t_cut: int
    advice: Advice
    validation_scores: list[Scored]
    screened_out: dict[str, str]
    origin_step: int | None = field(default=None, metadata=IF_KNOWN)
    rewards: dict[str, float] | None = field(default=None, metadata=IF_KNOWN)


@dataclass(frozen=True)
class CutReport(Record):
    """`report.json`.

    Attributes:
        t_cut: the last observed step.
        observed_steps: all of them.
        advice: the decision.
        recommended_path: the winner's checkpoint; None when none is recommended.
        validation_scores: of the last observed weights first, then of the predictions as they were scored.
        screened_out: method -> why it was not scored.
        predictions: checkpoints that were written.
        backtests: method -> error against holding, see `Findings`.
        fits: of all tensors.
        versions: of what made it.
        metrics: of the step.
        earlier_cuts: of this run, in their order.
        steps_saved: that need not be trained if the run ends here with the winner, less those that generate as many samples
            as all scoring took; 0 without a winner or at the run's end, below 0 where the scoring was dearer.
        next_cut: step of the cut that is planned next, if training goes on and its rows fit; None where none is.
        single_steps: whether observed steps can be had again: a sketch keeps none; None where nobody has said.
        origin_step: at which the window began that was fitted; None where nobody has said, 0 then.
        scoring: what the scores of this cut and of those before it took.
        rewards: training step -> mean reward of its samples, since the cut before and as far as this start of the run goes.
    """

    t_cut: int
    observed_steps: list[int]
    advice: Advice
    recommended_path: str | None
    validation_scores: list[Scored]
    screened_out: dict[str, str]
    predictions: list[Predicted]
    backtests: dict[str, float]
    fits: Fits
    versions: dict[str, str]
    metrics: dict[str, float]
    earlier_cuts: list[EarlierCut]
    steps_saved: int
    next_cut: int | None = field(default=None, metadata=IF_KNOWN)
    single_steps: bool | None = field(default=None, metadata=IF_KNOWN)
    origin_step: int | None = field(default=None, metadata=IF_KNOWN)
    scoring: Cost | None = field(default=None, metadata=IF_KNOWN)
    rewards: dict[str, float] | None = field(default=None, metadata=IF_KNOWN)
    schema_version: int = 1

    @classmethod
    def from_json(cls, content: Any, where: str = "the content") -> "CutReport":
        """See `Record`. A prediction that is advised is known by its folder's name alone: its rank and first step are read
        from the checkpoints of the same run."""
        report = super().from_json(content, where)
        like = report.predictions[0] if report.predictions else None
        if like is None:
            return report
        earlier = [replace(cut, advice=_of_run(cut.advice, like)) for cut in report.earlier_cuts]
        return replace(report, advice=_of_run(report.advice, like), earlier_cuts=earlier)

    @property
    def summary(self) -> EarlierCut:
        """What later reports say of it."""
        scored = self.validation_scores
        return EarlierCut(self.t_cut, self.advice, scored, self.screened_out, self.origin_step, self.rewards)


def _of_run(advice: Advice, like: Provenance) -> Advice:
    if advice.target is None:
        return advice
    fit_from = advice.target.fit_from if like.fit_from is None else like.fit_from
    return replace(advice, target=replace(advice.target, rank=like.rank, fit_from=fit_from))
