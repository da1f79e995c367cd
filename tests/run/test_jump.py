"""A run that jumps, with stand-ins for the ranks and for the trainer (real ones: tests/integration)."""

import json
from pathlib import Path
from typing import Any

import pytest
from stand_ins import CUT, Host, Workers, report, started, train

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.callback import RelexCallback
from relex_verl.run.config import ConfigError
from relex_verl.run.ranks import RelexError
from relex_verl.run.validation import RolloutSilent

# Scores by step: the line from step 0 peaks at step 12.
PEAK = {CUT: 0.5, 6: 0.6, 8: 0.7, 12: 0.8, 24: 0.2}
NOTHING_AHEAD = {CUT: 0.7, 6: 0.6, 8: 0.6}


def cut(callback: RelexCallback, step: int, quality: dict[int, float]) -> tuple[Host, dict[str, float]]:
    """Train up to a cut and score it."""
    train(callback, step - CUT + 1, step)
    assert callback.wants_scores
    host = Host(quality, cut=step)
    return host, callback.on_rollout_ready(step, host)


def test_the_weights_are_set_before_the_rollout_gets_the_policys_back(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump")
    train(callback, 1, CUT)
    order: list[str] = []
    host = Host(PEAK)
    host.relex_restore = lambda: order.extend([*workers.calls, "restore"])  # type: ignore[method-assign]
    metrics = callback.on_rollout_ready(CUT, host)
    assert order.index("relex_jump") < order.index("restore")
    ((step, prediction, optimizer, undoable),) = workers.jumps
    assert (step, prediction.method, optimizer, undoable) == (CUT, "relex", "keep", True)
    assert 6 <= prediction.target <= 12
    found = report(tmp_path)
    assert found["advice"]["action"] == "jump"
    assert found["steps_saved"] == 0
    assert found["next_cut"] == 2 * CUT
    assert metrics["relex/jump/made"] == 1.0
    assert metrics["relex/jump/horizon"] == prediction.target - CUT
    assert metrics["relex/jump/distance"] == 1.5
    assert metrics["relex/jump/gain"] > 0.1
    # Nothing is written for it: the trajectory has the weights, and training goes on from them.
    assert not (tmp_path / "predicted").exists()
    assert not (tmp_path / "recommended").exists()


def test_a_jump_has_to_stay_as_near_to_the_policy_as_is_asked_for(tmp_path: Path) -> None:
    """Measured while the rollout sleeps, on what would be jumped to, and told whatever comes of it."""
    callback, workers = started(tmp_path, on_cut="jump", jump_kl_max=0.1)
    workers.kl = 0.3
    host, metrics = cut(callback, CUT, PEAK)
    assert host.done == ["rest", "restore"]
    assert workers.jumps == []
    assert workers.calls[-3:] == ["relex_kl", "relex_begin", "relex_room"]
    assert (metrics["relex/jump/made"], metrics["relex/jump/kl"]) == (0.0, 0.3)
    advice = report(tmp_path)["advice"]
    assert (advice["action"], advice["target"], advice["kl"]) == ("keep_training", None, 0.3)
    assert "too far from the policy (token KL 0.3 of 0.1 allowed)" in advice["reason"]
    workers.kl = 0.05
    _, metrics = cut(callback, 2 * CUT, {8: 0.5, 10: 0.7, 14: 0.8, 40: 0.1})
    assert (metrics["relex/jump/made"], metrics["relex/jump/kl"]) == (1.0, 0.05)
    assert [step for step, *_ in workers.jumps] == [2 * CUT]
    assert report(tmp_path)["advice"]["kl"] == 0.05
    host, metrics = cut(callback, 3 * CUT, {12: 0.8, 14: 0.1})  # nothing is measured where nothing won
    assert host.done == ["restore"]
    assert "relex/jump/kl" not in metrics
    assert workers.calls.count("relex_kl") == 2


def test_without_a_bound_nothing_is_measured_and_nobody_has_to_sleep(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump")
    host, metrics = cut(callback, CUT, PEAK)
    assert host.done == ["restore"]
    assert "relex_kl" not in workers.calls
    assert "relex/jump/kl" not in metrics


def test_a_measurement_that_fails_switches_relex_off_and_no_weight_is_set(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, Workers(tmp_path, fails="relex_kl"), on_cut="jump", jump_kl_max=0.1)
    host, _ = cut(callback, CUT, PEAK)
    assert (host.done, workers.jumps, callback.active) == (["rest", "restore"], [], False)


def test_where_the_rollout_is_gone_no_rank_is_asked_any_more(tmp_path: Path) -> None:
    """They may be waiting in a weight update that nobody takes: one more question would wait for ever."""
    callback, workers = started(tmp_path, on_cut="jump")
    train(callback, 1, CUT)
    host = Host(PEAK, fails=RolloutSilent("gone"))

    def gone() -> None:
        raise RolloutSilent("gone")

    host.relex_restore = gone  # type: ignore[method-assign]
    before = list(workers.calls)
    with pytest.raises(RelexError, match="could not be given the policy's weights back"):
        callback.on_rollout_ready(CUT, host)
    assert workers.calls == before


def test_every_cut_has_its_window_and_the_search_begins_where_it_won_last(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump", steps=17)
    cut(callback, 4, PEAK)
    windows_far = workers.jumps[0][1].target / CUT
    host, _ = cut(callback, 8, {8: 0.7, 10: 0.8, 14: 0.9, 16: 0.95, 40: 0.1})
    first = host.asked[1]
    assert isinstance(first, Prediction)
    assert first.target == 4 + round(windows_far * 4)
    host, metrics = cut(callback, 12, {12: 0.9, 13: 0.1})
    assert metrics["relex/jump/made"] == metrics["relex/jump/undone"] == 0.0
    assert workers.calls.count("relex_begin") == 1
    assert workers.origin == 12  # whether or not it jumps
    cut(callback, 16, {16: 0.9, 17: 0.1})
    assert not callback.active  # none that could follow
    assert report(tmp_path)["next_cut"] is None if "next_cut" in report(tmp_path) else True


def test_a_horizon_below_one_and_a_half_windows_is_not_looked_for(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump")
    host, _ = cut(callback, CUT, NOTHING_AHEAD)
    assert [one.target for one in host.asked if isinstance(one, Prediction)] == [6]
    assert workers.jumps == []
    assert report(tmp_path)["advice"]["action"] == "keep_training"
    assert callback.plan.t_cut == 2 * CUT


def test_what_falls_behind_the_weights_before_the_jump_is_undone(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump")
    cut(callback, 4, PEAK)
    host, metrics = cut(callback, 8, {8: 0.3, 20: 0.9})
    assert host.asked == ["observed"]  # and nothing is searched along a line that is given up
    assert workers.jumps[1:] == [(8, "undone")]
    assert metrics["relex/jump/undone"] == 1.0
    assert report(tmp_path)["advice"]["action"] == "undo"
    host, _ = cut(callback, 12, PEAK | {12: 0.5, 18: 0.8})
    assert len(host.asked) > 1


def test_a_jump_that_may_not_be_undone_stays(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump", jump_undo=False, jump_optimizer="reset")
    cut(callback, 4, PEAK)
    assert workers.jumps[0][2:] == ("reset", False)
    cut(callback, 8, {8: 0.3, 10: 0.2})
    assert len(workers.jumps) == 1


@pytest.mark.parametrize("undo", [True, False])
def test_after_the_last_jump_that_is_allowed_one_more_cut_may_undo_it(tmp_path: Path, undo: bool) -> None:
    callback, workers = started(tmp_path, on_cut="jump", max_jumps=1, jump_undo=undo)
    cut(callback, 4, PEAK)
    assert callback.active == undo
    if undo:
        host, _ = cut(callback, 8, {8: 0.9})
        assert host.asked == ["observed"]
        assert "no jump is left" in report(tmp_path)["advice"]["reason"]
        assert not callback.active
    assert len(workers.jumps) == 1


def test_the_last_step_of_a_run_is_no_place_for_a_jump(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump", steps=CUT)
    cut(callback, CUT, PEAK)
    assert workers.jumps == []


def test_a_rank_that_cannot_jump_switches_relex_off_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, workers = started(tmp_path, Workers(tmp_path, fails="relex_jump"), on_cut="jump")
    host, metrics = cut(callback, CUT, PEAK)
    assert metrics == {}
    assert host.done == ["restore"]
    assert not callback.active
    assert "disk on fire" in caplog.text
    assert workers.calls[-1] == "relex_stop"


def test_a_validation_that_fails_costs_one_window(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump")
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host({}, fails=RuntimeError("hung")))
    assert report(tmp_path)["advice"]["action"] == "unscored"
    assert callback.plan.t_cut == 2 * CUT
    assert workers.origin == CUT


def test_a_run_that_comes_back_to_a_jump_makes_it_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """verl's checkpoint of the cut was saved before it."""
    callback, _ = started(tmp_path, on_cut="jump")
    cut(callback, CUT, PEAK)
    again = Workers(tmp_path)
    again.began, again.origin = True, CUT
    callback, _ = started(tmp_path, again, step=CUT, on_cut="jump")
    assert again.calls.count("relex_replay") == 1
    assert callback.plan.t_cut == 2 * CUT
    assert not callback.wants_scores
    _host, _ = cut(callback, 2 * CUT, {8: 0.1})  # and may still undo it
    assert again.jumps == [(8, "undone")]


def test_a_run_that_was_killed_before_its_report_makes_the_jump_all_the_same(tmp_path: Path) -> None:
    callback, _workers = started(tmp_path, on_cut="jump")
    train(callback, 1, CUT)
    again = Workers(tmp_path)
    again.began, again.origin = True, CUT
    callback, _ = started(tmp_path, again, step=CUT, on_cut="jump")
    assert "relex_replay" in again.calls
    assert callback.plan.t_cut == 2 * CUT


def test_a_run_that_was_killed_before_its_report_knows_what_it_has_decided(tmp_path: Path) -> None:
    """So it searches on where it won, and may undo the jump, as the run that was not killed."""
    whole, _ = started(tmp_path / "whole", on_cut="jump")
    cut(whole, CUT, PEAK)
    callback, _ = started(tmp_path / "killed", on_cut="jump")
    train(callback, 1, CUT)
    host = Host(PEAK)

    def die() -> None:
        raise OSError("the node is gone")

    host.relex_restore = die  # type: ignore[method-assign]
    with pytest.raises(RelexError):
        callback.on_rollout_ready(CUT, host)
    assert not (tmp_path / "killed" / "report.json").exists()
    again = Workers(tmp_path / "killed")
    again.began, again.origin = True, CUT
    callback, _ = started(tmp_path / "killed", again, step=CUT, on_cut="jump")
    assert callback.plan == whole.plan
    assert callback.schedule.earlier == whole.schedule.earlier
    assert report(tmp_path / "killed") == report(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("decided.json"))
    cut(callback, 2 * CUT, {8: 0.1})
    assert again.jumps == [(8, "undone")]


def test_a_run_that_was_killed_before_its_jump_cuts_again(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, on_cut="jump")
    train(callback, 1, CUT)
    callback, again = started(tmp_path, step=CUT, on_cut="jump")
    assert callback.wants_scores
    host = Host(PEAK)
    callback.on_train_begin(CUT, host, type("Log", (), {"logger": {}})())
    assert len(again.jumps) == 1


def test_a_run_whose_last_cut_jumped_makes_it_again_although_nothing_is_observed_any_more(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, on_cut="jump", steps=7)
    cut(callback, CUT, PEAK)
    assert not callback.active
    again = Workers(tmp_path)
    again.began = True
    callback, _ = started(tmp_path, again, step=CUT, steps=7, on_cut="jump")
    assert "relex_replay" in again.calls
    assert not callback.active


def test_scores_of_a_cut_are_read_back_or_not_there(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, on_cut="jump")
    cut(callback, CUT, PEAK)
    output: Any = callback._output
    file = tmp_path / "scores" / "cut_4" / "observed-step_4.json"
    before = output.observed_scores(CUT)
    assert before.samples == json.loads(file.read_text())
    for damaged in ("", "[]", '{"a": 1}', '{"a": ["x"]}'):
        file.write_text(damaged)
        assert output.observed_scores(CUT) is None
    file.unlink()
    assert output.observed_scores(CUT) is None


def test_an_engine_without_float32_weights_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a jump sets float32 master weights, and it has none"):
        started(tmp_path, Workers(tmp_path, reason="it has none"), on_cut="jump")
