"""One cut: score the predictions in the run and decide. No predicted checkpoint is recommended unless it won."""

import logging
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

from relex_verl.advice import Advice, advise, decides, unscored
from relex_verl.config import Plan, RelexConfig
from relex_verl.hf_checkpoint import write_json
from relex_verl.prediction import Prediction
from relex_verl.search import screen, search
from relex_verl.verl_plugin.scoring import Validation

__all__ = ["Host", "Verdict", "decide"]

logger = logging.getLogger("relex_verl")


class Host(Protocol):
    """What a trainer lends: see `trainer._RelexTrainerMixin`."""

    def relex_validate(self, weights: Prediction | str, metric: str | None, timeout: float) -> Validation: ...

    def relex_restore(self) -> None: ...

    def relex_end_training(self) -> None: ...


@dataclass
class Verdict:
    """What came of the scoring at a cut.

    Attributes:
        advice: the decision.
        hold: validation of the last observed weights; None when nothing could be scored.
        scored: predictions with their validations, in the order in which they were scored.
        search_scores: folder name -> score on the half of the prompts that the search saw.
        screened_out: method -> why it was not scored.
    """

    advice: Advice
    hold: Validation | None = None
    scored: list[tuple[Prediction, Validation]] = field(default_factory=list)
    search_scores: dict[str, float] = field(default_factory=dict)
    screened_out: dict[str, str] = field(default_factory=dict)

    @property
    def winner(self) -> Prediction | None:
        """The recommended prediction."""
        return next((one for one, _ in self.scored if one.folder_name == self.advice.target), None)

    def rows(self, t_cut: int) -> list[dict[str, Any]]:
        """For the report and the tables: the last observed weights first."""
        if self.hold is None:
            return []
        named: list[tuple[str, str | None, int, Validation]] = [(f"observed-step_{t_cut}", None, t_cut, self.hold)]
        named += [(one.folder_name, one.method, one.target, validation) for one, validation in self.scored]
        return [
            {
                "name": name,
                "method": method,
                "target": target,
                "metric": validation.metric,
                "score": validation.score,
                "search_score": self.search_scores.get(name),
                "prompts": len(validation.prompts),
                "seconds": validation.seconds,
                "metrics": validation.metrics,
            }
            for name, method, target, validation in named
        ]

    def metrics(self) -> dict[str, float]:
        """`relex/val/<method>-step_<N>/...` and what the scoring cost."""
        if self.hold is None:
            return {}
        flat = {f"relex/val/observed/{name}": value for name, value in self.hold.metrics.items()}
        for prediction, validation in self.scored:
            flat |= {f"relex/val/{prediction.folder_name}/{name}": value for name, value in validation.metrics.items()}
        seconds = self.hold.seconds + sum(validation.seconds for _, validation in self.scored)
        return {**flat, "relex/val/candidates": float(len(self.scored)), "relex/val/seconds": seconds}

    def keep_scores(self, folder: Path, t_cut: int) -> None:
        """Write every prompt's scores, one file a scored set of weights."""
        if self.hold is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"observed-step_{t_cut}.json", self.hold.prompts)
        for prediction, validation in self.scored:
            write_json(folder / f"{prediction.folder_name}.json", validation.prompts)


def decide(host: Host, config: RelexConfig, plan: Plan, window: dict[str, Any]) -> Verdict:
    """Score the last observed weights and up to `relex.max_candidates` predictions with verl's own validation.

    The caller restores the rollout's weights afterwards, whatever happens here.

    Args:
        host: the trainer.
        config: the `relex` node.
        plan: of this cut.
        window: "backtests" (method -> error against holding), "drift" and "agreement", from rank 0.
    """
    methods, screened = screen(window["backtests"], window["drift"], window["agreement"])
    for method, reason in screened.items():
        logger.info("RELEX: %s is not scored: %s", method, reason)
    verdict = Verdict(unscored("no validation"), screened_out=screened)
    try:
        _score(host, config, plan, methods, verdict)
    except Exception as error:
        logger.warning("RELEX: the scoring at step %d failed; nothing is recommended", plan.t_cut, exc_info=True)
        verdict.advice = unscored(f"the validation failed ({type(error).__name__}: {error})")
    return verdict


def _score(host: Host, config: RelexConfig, plan: Plan, methods: list[str], verdict: Verdict) -> None:
    timeout = config.validation_timeout_s
    logger.info("RELEX: scoring the weights of step %d", plan.t_cut)
    hold = host.relex_validate("observed", config.score_metric, timeout)
    searched = [prompt for prompt in hold.prompts if not decides(prompt)]
    if not searched or len(searched) == len(hold.prompts):
        verdict.advice = unscored(f"{len(hold.prompts)} validation prompts are too few to split")
        return
    verdict.hold = hold
    verdict.search_scores[f"observed-step_{plan.t_cut}"] = hold.mean(searched)

    def score(method: str, target: int) -> float:
        prediction = Prediction(method, target, config.rank, config.fit_from)
        validation = host.relex_validate(prediction, config.score_metric, timeout)
        verdict.scored.append((prediction, validation))
        verdict.search_scores[prediction.folder_name] = validation.mean(searched)
        spent = f"{len(verdict.scored)} of at most {config.max_candidates}"
        logger.info(
            "RELEX: %s scores %.3f, step %d %.3f (%s, %.0f s)",
            prediction.folder_name, validation.score, plan.t_cut, hold.score, spent, validation.seconds,
        )  # fmt: skip
        return validation.mean(searched)

    margin = 0.5 / sqrt(len(searched))  # at most one standard error of a mean of scores between 0 and 1
    budget = config.max_candidates
    candidates = search(score, methods, plan.targets, plan.t_cut, hold.mean(searched), budget, margin)
    best = max(candidates, key=lambda one: one.score)
    prediction = Prediction(best.method, best.target, config.rank, config.fit_from)
    validation = next(validation for one, validation in verdict.scored if one == prediction)
    advice = advise(prediction.folder_name, validation.prompts, hold.prompts, plan.t_cut, config.confidence)
    if advice.action == "stop" and validation.score <= hold.score:  # won on one half only
        reason = advice.reason.replace("Stop", "Keep training", 1) + ", but not on all prompts"
        advice = Advice("keep_training", None, reason, advice.score, advice.hold_score, advice.prompts, advice.p_value)
    verdict.advice = advice
