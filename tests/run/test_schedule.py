"""Which cut comes next, from the start and after a resume."""

from typing import Any

import pytest
from cut_reports import earlier_cut
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.config import ConfigError, RelexConfig
from relex_verl.run.schedule import Schedule


def schedule(total_steps: int = 20, **relex: Any) -> Schedule:
    return Schedule(RelexConfig.from_mapping({"t_cut": 4, "targets": [20], **relex}), total_steps)


def walked(of: Schedule) -> list[int]:
    """All cuts that a run without a win makes, spending alpha on the way."""
    cuts, shares = [], []
    while of.plan is not None:
        cuts.append(of.plan.t_cut)
        shares.append(of.alpha_share)
        of.earlier.append(earlier_cut(of.plan.t_cut))
        of.plan = of.following()
    assert sum(shares) == pytest.approx(1.0)
    return cuts


def test_a_run_is_cut_until_it_ends() -> None:
    assert walked(schedule()) == [4, 8, 12, 16]  # 20 would save nothing
    assert walked(schedule(recut_every=7)) == [4, 11, 18]
    assert schedule().saved == 16


def test_each_kind_has_its_own_rows() -> None:
    both = schedule(100, t_cut=32, targets=[60])
    assert {kind: plan.rows for kind, plan in both.plans.items()} == {"fp32-int8": 16, "bf16": 32}
    both.follow("bf16")
    assert both.plan == both.plans["bf16"]
    assert schedule(100, trajectory="bf16").plans.keys() == {"bf16"}
    assert schedule(100, trajectory="sketch").plans.keys() == {"sketch-4"}
    with pytest.raises(ConfigError, match=r"relex\.rank=20: only 16 steps are observed"):
        schedule(100, t_cut=32, targets=[60], rank=20)


def test_a_cut_whose_step_the_run_skips_is_at_the_next(caplog: pytest.LogCaptureFixture) -> None:
    of = schedule(targets=[5, 20])
    assert of.observes(3)
    assert of.observes(4)
    assert (of.plan.t_cut, caplog.text) == (4, "")
    assert of.observes(6)
    assert (of.plan.t_cut, of.plan.targets, of.saved) == (6, [20], 14)
    assert "has skipped step 4" in caplog.text
    assert of.following().t_cut > 6
    last = schedule(t_cut=19)
    assert not last.observes(20)
    assert last.plan.t_cut == 19  # nothing is left to be saved


def test_predictions_of_the_coming_cut() -> None:
    of = schedule(methods=["relex", "anchored"], targets=[6, 20], fit_from=2)
    assert of.predictions == [Prediction(m, t, 1, 2) for m in ("relex", "anchored") for t in (6, 20)]
    of.plan = of.following()
    assert {one.target for one in of.predictions} == {20}
    of.plan = None
    assert (of.predictions, of.saved, of.following()) == ([], 0, None)


@given(st.integers(1, 60), st.integers(2, 60), st.data())
def test_a_resume_goes_on_where_the_run_would_be(t_cut: int, total: int, data: st.DataObject) -> None:
    t_cut = min(t_cut, total - 1)
    of, whole = (
        schedule(total, t_cut=max(1, t_cut), targets=[100], observe_every=1, methods=["hold"]) for _ in range(2)
    )
    cuts = walked(whole)
    step = data.draw(st.integers(1, total))
    told = data.draw(st.booleans())  # whether the cut of that very step had come to its verdict
    behind = [cut for cut in cuts if cut < step or (cut == step and told)]
    of.resume(step, [earlier_cut(cut) for cut in behind])
    following = [cut for cut in cuts if cut not in behind]
    assert (None if of.plan is None else of.plan.t_cut) == (following[0] if following else None)


@pytest.mark.parametrize("action", ["stop", "unscored"])
def test_a_final_verdict_is_the_last(action: str) -> None:
    of = schedule()
    of.resume(9, [earlier_cut(4), earlier_cut(8, action)])
    assert of.plan is None
