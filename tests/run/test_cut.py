"""The decision at a cut: never from how good a fit looks, never for weights that score no better."""

import logging
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from cut_reports import FOUND
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import CUT, METRIC, PROMPTS, Host

from relex_verl.maths.advice import decides
from relex_verl.maths.diagnostics import describe, half_backtest, split_half_agreement
from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.gram import delta_gram
from relex_verl.maths.search import screen
from relex_verl.maths.window import Window
from relex_verl.reporting.findings import Findings
from relex_verl.run.config import RelexConfig
from relex_verl.run.cut import Verdict, decide
from relex_verl.run.validation import Validation, ValidationTimeout

CONFIG = RelexConfig.from_mapping({"t_cut": CUT, "observe_every": 1, "targets": [20]})


def verdict_of(host: Any, findings: Findings = FOUND, config: RelexConfig = CONFIG, share: float = 1.0) -> Verdict:
    return decide(host, config, config.plan(100), findings, share)


class Fixed:
    """A trainer that gives the observed weights one score a prompt, all predictions another."""

    relex_rewards: ClassVar[dict[int, float]] = {}

    def __init__(self, hold: dict[str, float], candidate: dict[str, float], overall: float | None = None) -> None:
        self.hold, self.candidate, self.overall = hold, candidate, overall

    def relex_validate(
        self, weights: Prediction | str, metric: str | None, timeout: float, places: Any = None
    ) -> Validation:
        scores = self.hold if weights == "observed" else self.candidate
        mean = sum(scores.values()) / len(scores)
        score = mean if weights == "observed" or self.overall is None else self.overall
        return Validation({METRIC: score}, METRIC, {prompt: [one] for prompt, one in scores.items()}, 0.1)


@st.composite
def random_walks(draw: st.DrawFn) -> Findings:
    """What rank 0 says of tensors whose increments have nothing to do with one another."""
    rows, size = draw(st.integers(2, 24)), draw(st.integers(2, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    gap = draw(st.integers(1, 7))
    steps = [gap * (i + 1) for i in range(rows)]
    scale = 10 ** draw(st.floats(-8, 0))
    increments_LTn = torch.randn(draw(st.integers(1, 3)), rows, size, generator=generator, dtype=torch.float64) * scale
    gram_LTT = delta_gram(increments_LTn @ increments_LTn.transpose(1, 2))
    window = Window([str(i) for i in range(len(gram_LTT))], steps, gram_LTT)
    figures = describe(window)
    methods = draw(st.lists(st.sampled_from(["relex", "anchored", "two-point", "poly"]), min_size=1, unique=True))
    return replace(
        FOUND,
        backtests={method: half_backtest(window, method) for method in methods},
        drift=figures["drift"].nanmean().item(),
        agreement=split_half_agreement(gram_LTT).nanmean().item(),
    )


@settings(max_examples=60, deadline=None)
@given(
    random_walks(),
    st.sampled_from([ValueError("no validation set"), ValidationTimeout("hung"), None]),
    st.floats(0, 1),
    st.floats(0.5, 0.999),
)
def test_a_random_walk_is_never_advice_to_stop(
    findings: Findings, fails: Exception | None, quality: float, confidence: float
) -> None:
    """However straight it looks: without scores, or with scores that are the same, nothing is recommended."""
    kept, reasons = screen(findings.backtests, findings.drift, findings.agreement)
    assert kept
    assert set(kept) | set(reasons) == set(findings.backtests)
    config = RelexConfig.from_mapping({**vars(CONFIG), "confidence": confidence})
    verdict = verdict_of(Host({CUT: quality}, fails=fails), findings, config)
    assert verdict.advice.action == ("unscored" if fails else "keep_training")
    assert verdict.winner is None


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.integers(5, 200), st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1), st.floats(0.5, 0.99)
)
def test_what_is_recommended_scored_better_on_both_halves(
    quality: dict[int, float], held: float, confidence: float
) -> None:
    config = RelexConfig.from_mapping({**vars(CONFIG), "confidence": confidence})
    verdict = verdict_of(Host({CUT: held, **quality}), config=config)
    assert verdict.hold is not None
    assert len(verdict.scored) <= config.max_candidates
    if verdict.advice.action == "keep_training":
        assert verdict.winner is None
        return
    won = next(validation for one, validation in verdict.scored if one == verdict.winner)
    assert won.score > verdict.hold.score
    deciding = [prompt for prompt in PROMPTS if decides(prompt)]
    assert won.mean(deciding) > verdict.hold.mean(deciding)


def test_a_win_on_the_deciding_half_alone_is_none() -> None:
    half = {prompt: float(decides(prompt)) for prompt in PROMPTS}
    advice = verdict_of(Fixed(dict.fromkeys(PROMPTS, 0.0), half, overall=0.0)).advice
    assert advice.action == "keep_training"
    assert advice.target is None
    assert advice.reason.startswith("Keep training: relex-step_20 scores 1.000 against 0.000")
    assert advice.reason.endswith("but not on all prompts")


def test_prompts_that_did_not_come_back_are_left_out() -> None:
    """One validation lost some, the other one others: only those of both are compared, and none is missed."""
    advice = verdict_of(Fixed(dict.fromkeys(PROMPTS[5:], 0.0), dict.fromkeys(PROMPTS[:-5], 1.0))).advice
    assert advice.prompts == sum(map(decides, PROMPTS[5:-5]))


def test_too_few_prompts_to_split() -> None:
    one_half = dict.fromkeys([prompt for prompt in PROMPTS if decides(prompt)], 1.0)
    verdict = verdict_of(Fixed(one_half, one_half))
    assert verdict.advice.action == "unscored"
    assert verdict.scored == []
    assert verdict.metrics() == {}


def test_candidates_are_judged_by_the_metric_of_the_observed_weights() -> None:
    host = Host({CUT: 0.5, 20: 0.9})
    verdict_of(host)
    assert host.metrics[0] is None
    assert set(host.metrics[1:]) == {METRIC}


def test_every_validation_is_announced_before_it_starts(caplog: pytest.LogCaptureFixture) -> None:
    config = RelexConfig.from_mapping({**vars(CONFIG), "max_candidates": 2})
    with caplog.at_level(logging.INFO, "relex_verl"):
        verdict_of(Host({CUT: 0.5, 20: 0.9}), config=config)
    said = [record.message for record in caplog.records]
    assert said[0] == "RELEX: scoring observed-step_4"
    assert said[2] == "RELEX: scoring relex-step_20 (1 of at most 2)"
    assert said[4] == "RELEX: scoring relex-step_40 (2 of at most 2)"
    assert said[3].startswith("RELEX: relex-step_20 scores 0.9")


def test_what_was_scored_before_a_failure_is_kept() -> None:
    class FailsLater(Host):
        def relex_validate(self, *args: Any) -> Validation:
            if len(self.asked) == 2:
                raise OSError("the reward server is gone")
            return super().relex_validate(*args)

    verdict = verdict_of(FailsLater({CUT: 0.5, 20: 0.9}))
    assert verdict.advice.action == "unscored"
    assert "OSError: the reward server is gone" in verdict.advice.reason
    assert [row.name for row in verdict.rows(CUT)] == ["observed-step_4", "relex-step_20"]
    assert verdict.winner is None


def test_rows_and_metrics() -> None:
    verdict = verdict_of(Host({CUT: 0.5, 20: 0.9}))
    held, first, *_ = verdict.rows(CUT)
    assert (held.name, held.method, held.target) == ("observed-step_4", None, CUT)
    assert (first.name, first.method, first.target) == ("relex-step_20", "relex", 20)
    assert first.standard_error == pytest.approx((first.score * (1 - first.score) / 399) ** 0.5)
    metrics = verdict.metrics()
    assert metrics[f"relex/val/relex-step_20/{METRIC}"] == first.score
    assert metrics["relex/val/relex-step_20/seconds"] == metrics["relex/val/observed/seconds"] == 1.0
    assert metrics["relex/val/seconds"] == 1.0 + metrics["relex/val/candidates"]


def test_a_screening_that_fails_is_unscored() -> None:
    assert (
        verdict_of(Host({CUT: 0.5}), replace(FOUND, backtests={"relex": 0.5, "poly": None})).advice.action == "unscored"
    )
    assert verdict_of(Host({CUT: 0.5}), replace(FOUND, backtests={})).advice.action == "unscored"


SEARCHED = [i for i, prompt in enumerate(PROMPTS) if not decides(prompt)]
FEW = RelexConfig.from_mapping(
    {"t_cut": CUT, "observe_every": 1, "targets": [20], "search_prompts": 32.0, "max_candidates": 2}
)


def test_a_search_on_few_prompts_comes_to_the_same_test_for_less() -> None:
    quality = {CUT: 0.5, 20: 0.9, 40: 0.3, 80: 0.1}
    everything, few = Host(quality), Host(quality)
    whole, cheap = verdict_of(everything, config=replace(FEW, search_prompts=None)), verdict_of(few, config=FEW)
    assert cheap.advice == whole.advice
    assert cheap.winner is not None
    # The observed weights, and each candidate on the first prompts of the search; then only the winner on the others.
    first = set(SEARCHED[:32])
    assert few.places == [None, first, first, set(range(400)) - first]
    assert [row.prompts for row in cheap.rows(CUT)] == [400, 400, 32]
    assert sum(row.samples or 0 for row in cheap.rows(CUT)) == 832
    assert whole.rows(CUT)[1].score == cheap.rows(CUT)[1].score


def test_candidates_that_are_not_told_apart_get_more_prompts_each_once() -> None:
    host = Host({CUT: 0.5, 6: 0.9})  # whatever is predicted
    verdict = verdict_of(host, config=FEW)
    asked: dict[str, list[int]] = {}
    for weights, places in zip(host.asked[1:], host.places[1:], strict=True):
        assert isinstance(weights, Prediction)
        assert places is not None
        asked.setdefault(weights.folder_name, []).extend(places)
    assert all(len(set(places)) == len(places) for places in asked.values())
    winner = verdict.advice.target
    assert winner is not None
    assert sorted(asked.pop(winner.folder_name)) == list(range(400))
    assert asked
    assert all(sorted(places) == SEARCHED for places in asked.values())


def test_a_host_that_does_not_know_its_rows_is_searched_on_all_or_not_at_all() -> None:
    host = Fixed(dict.fromkeys(PROMPTS, 0.0), dict.fromkeys(PROMPTS, 1.0))
    assert verdict_of(host).advice.action == "stop"
    assert verdict_of(host, config=FEW).advice.action == "unscored"
