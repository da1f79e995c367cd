"""One cut: score the predictions in the run and decide. No predicted checkpoint is recommended unless it won."""

import logging
from dataclasses import dataclass, field

from relex_verl.maths.advice import Advice, Scores, advise, decides, unscored
from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.harm import judge_jump, judge_undo
from relex_verl.maths.search import contenders, screen, search
from relex_verl.reporting.findings import Findings, Scored
from relex_verl.run.config import RelexConfig
from relex_verl.run.plan import NEAREST_JUMP, Plan
from relex_verl.run.protocol import OBSERVED, Host, Weights
from relex_verl.run.ranks import RelexError
from relex_verl.run.validation import RolloutSilent, Validation

__all__ = ["Jumps", "Verdict", "decide", "restore"]

logger = logging.getLogger("relex_verl")


@dataclass
class Verdict:
    """What came of the scoring at a cut.

    Attributes:
        advice: the decision.
        hold: validation of the last observed weights; None when nothing could be scored.
        scored: predictions with their validations, in the order in which they were scored.
        search_scores: folder name -> score on the half of the prompts that the search saw.
        screened_out: method -> why it was not scored.
        jump: metrics of a run that jumps, see `jump.carry_out`.
        rewards: training step -> mean reward, as the host knows them.
        silent: the rollout is gone, and the ranks cannot be asked any more.
    """

    advice: Advice
    hold: Validation | None = None
    scored: list[tuple[Prediction, Validation]] = field(default_factory=list)
    search_scores: dict[str, float] = field(default_factory=dict)
    screened_out: dict[str, str] = field(default_factory=dict)
    jump: dict[str, float] = field(default_factory=dict)
    rewards: dict[int, float] = field(default_factory=dict)
    silent: bool = False

    @property
    def winner(self) -> Prediction | None:
        """The recommended prediction."""
        return self.advice.target

    def validations(self, t_cut: int) -> dict[str, Validation]:
        """Name -> validation, the last observed weights first."""
        held = {} if self.hold is None else {f"observed-step_{t_cut}": self.hold}
        return held | {prediction.folder_name: validation for prediction, validation in self.scored}

    def rows(self, t_cut: int) -> list[Scored]:
        """For the report and the tables."""
        predicted = {prediction.folder_name: prediction for prediction, _ in self.scored}
        return [
            Scored(
                name=name,
                method=predicted[name].method if name in predicted else None,
                target=predicted[name].target if name in predicted else t_cut,
                metric=validation.metric,
                score=validation.score,
                standard_error=validation.standard_error(),
                search_score=self.search_scores.get(name),
                prompts=len(validation.prompts),
                seconds=validation.seconds,
                metrics=validation.metrics,
                samples=validation.generated,
            )
            for name, validation in self.validations(t_cut).items()
        ]

    def metrics(self) -> dict[str, float]:
        """`relex/val/<method>-step_<N>/...`, and what each validation and all of them cost, in seconds and in samples."""
        if self.hold is None:
            return self.jump
        flat = self.jump | {"relex/val/candidates": float(len(self.scored))}
        for name, validation in [
            ("observed", self.hold),
            *((prediction.folder_name, validation) for prediction, validation in self.scored),
        ]:
            flat |= {f"relex/val/{name}/{metric}": value for metric, value in validation.metrics.items()}
            flat[f"relex/val/{name}/seconds"] = validation.seconds
            for what, spent in (("seconds", validation.seconds), ("samples", float(validation.generated))):
                flat[f"relex/val/{what}"] = flat.get(f"relex/val/{what}", 0.0) + spent
        return flat


@dataclass(frozen=True)
class Jumps:
    """What a cut of a run that jumps has to know of the ones before.

    Attributes:
        allowed: whether this cut may jump.
        undoable: the step of the last jump, if this is the first cut after it and it can still be undone.
        before: scores of the weights before that jump; None where they are not known any more.
    """

    allowed: bool
    undoable: int | None = None
    before: Scores | None = None


def decide(
    host: Host, config: RelexConfig, plan: Plan, findings: Findings, share: float = 1.0, jumps: Jumps | None = None
) -> Verdict:
    """Score the last observed weights and up to `relex.max_candidates` predictions with verl's own validation.

    The caller restores the rollout's weights afterwards, whatever happens here.

    Args:
        host: the trainer.
        config: the `relex` node.
        plan: of this cut.
        findings: of rank 0 in the window.
        share: of alpha that this cut may spend, see `advice.alpha_share`.
        jumps: of a run that jumps; None for any other.
    """
    verdict = Verdict(unscored("no validation"), rewards=dict(host.relex_rewards))
    try:
        methods, verdict.screened_out = screen(findings.backtests, findings.drift, findings.agreement)
        for method, reason in verdict.screened_out.items():
            logger.info("RELEX: %s is not scored: %s", method, reason)
        scoring = _Scoring(host, config, plan, verdict)
        verdict.advice = scoring.run(methods, findings.origin_step, share, jumps)
    except Exception as error:
        logger.warning("RELEX: the scoring at step %d failed; nothing is recommended", plan.t_cut, exc_info=True)
        verdict.silent = isinstance(error, RolloutSilent)
        verdict.advice = unscored(f"the validation failed ({type(error).__name__}: {error})")
    return verdict


def restore(host: Host, step: int) -> None:
    """Outside every guard: a rollout that kept a prediction's weights would sample the next step from them.

    Raises:
        RelexError: the rollout could not be given the policy's weights back.
    """
    try:
        host.relex_restore()
    except Exception as error:
        raise RelexError(
            f"after the scoring at step {step} the rollout could not be given the policy's weights back. Training on "
            "would sample from other weights than the policy's, so the run ends here, whatever relex.on_error says: "
            "resume it from its last checkpoint"
        ) from error


class _Scoring:
    """The validations of one cut. What they give is kept in the verdict as it comes: a later one may fail."""

    def __init__(self, host: Host, config: RelexConfig, plan: Plan, verdict: Verdict) -> None:
        self.host, self.config, self.plan, self.verdict = host, config, plan, verdict

    def run(self, methods: list[str], origin_step: int, share: float, jumps: Jumps | None) -> Advice:
        """Score the last observed weights, search along the lines from the origin, and test the best that was found."""
        plan, verdict, config = self.plan, self.verdict, self.config
        observed = f"observed-step_{plan.t_cut}"
        hold = self._validate(observed, OBSERVED, config.score_metric)
        searched = [prompt for prompt in hold.prompts if not decides(prompt)]
        if not searched or len(searched) == len(hold.prompts):
            return unscored(f"{len(hold.prompts)} validation prompts are too few to split")
        verdict.hold = hold
        verdict.search_scores[observed] = hold.mean(searched)
        if jumps is not None:
            undo = self._fallen_behind(hold, jumps)
            if undo is not None:
                return undo
            if not jumps.allowed:
                return Advice("keep_training", None, f"Keep training: no jump is left at step {plan.t_cut}")

        first = searched[: config.search_prompts]
        places = None if config.search_prompts is None else hold.places_of(first)

        def score(method: str, target: int) -> float:
            prediction = self._prediction(method, target)
            count = f" ({len(verdict.scored) + 1} of at most {config.max_candidates})"
            # By the metric of the observed weights, whichever the configuration left open.
            validation = self._validate(prediction.folder_name, prediction, hold.metric, count, places)
            verdict.scored.append((prediction, validation))
            verdict.search_scores[prediction.folder_name] = search_score = validation.mean(first)
            return search_score

        noise, held = hold.standard_error(first), hold.mean(first)
        nearest = 1.0 if jumps is None else NEAREST_JUMP
        candidates = search(
            score, methods, plan.targets, plan.t_cut, held, config.max_candidates, noise, origin_step, nearest
        )
        if not candidates:
            return unscored("no method is left to score")
        best = max(candidates, key=lambda candidate: candidate.score)
        prediction = self._prediction(best.method, best.target)
        if places is not None:
            prediction = self._narrowed(searched, len(first))
        validation = next(validation for scored, validation in verdict.scored if scored == prediction)
        if jumps is not None:
            return judge_jump(prediction, validation, hold, plan.t_cut, config.jump_confidence)
        return advise(prediction, validation, hold, plan.t_cut, config.confidence, share)

    def _narrowed(self, searched: list[str], known: int) -> Prediction:
        """The best of the candidates, which were scored on `known` prompts of the search; it is scored on all then."""
        hold, scored = self.verdict.hold, self.verdict.scored
        assert hold is not None
        left = [prediction for prediction, _ in scored]
        while True:
            chosen = [prompt for prompt in searched[:known] if all(prompt in v.prompts for p, v in scored if p in left)]
            left = contenders({p: {one: v.prompts[one] for one in chosen} for p, v in scored if p in left})
            if len(left) == 1 or known >= len(searched):
                break
            for prediction in left:
                self._add(prediction, searched[known : 2 * known], searched)
            known *= 2
        validation = next(validation for prediction, validation in scored if prediction == left[0])
        self._add(left[0], [prompt for prompt in hold.prompts if prompt not in validation.prompts], searched)
        return left[0]

    def _add(self, prediction: Prediction, prompts: list[str], searched: list[str]) -> None:
        """Score a candidate on more prompts."""
        verdict = self.verdict
        assert verdict.hold is not None
        if not prompts:
            return
        i = next(i for i, (scored, _) in enumerate(verdict.scored) if scored == prediction)
        name, metric = prediction.folder_name, verdict.hold.metric
        places = verdict.hold.places_of(prompts)
        more = self._validate(name, prediction, metric, f" on {len(prompts)} more prompts", places)
        verdict.scored[i] = prediction, verdict.scored[i][1].with_more(more)
        verdict.search_scores[name] = verdict.scored[i][1].mean(searched)

    def _fallen_behind(self, now: Validation, jumps: Jumps) -> Advice | None:
        if jumps.undoable is None or jumps.before is None:
            return None
        return judge_undo(now, jumps.before, self.plan.t_cut, jumps.undoable, self.config.jump_confidence)

    def _prediction(self, method: str, target: int) -> Prediction:
        return Prediction(method, target, self.config.rank, self.config.fit_from)

    def _validate(
        self, name: str, weights: Weights, metric: str | None, count: str = "", places: set[int] | None = None
    ) -> Validation:
        logger.info("RELEX: scoring %s%s", name, count)
        validation = self.host.relex_validate(weights, metric, self.config.validation_timeout_s, places)
        logger.info("RELEX: %s scores %.3f (%.0f s)", name, validation.score, validation.seconds)
        return validation
