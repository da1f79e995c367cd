"""The run's own validation scores, and the weights of the best, with stand-ins for the ranks."""

import json
import math
from pathlib import Path

import pytest
from stand_ins import CUT, METRIC, STEPS, Host, Workers, started, train

from relex_verl.run.scores import FILE, Validated, best_of, read_scores
from relex_verl.trajectory.index import TrajectoryError

LOSES = {CUT: 0.7, 6: 0.6, 20: 0.1}
OTHER = "val-core/words/acc/mean@1"


def validated(callback, scores: dict[int, float]) -> None:
    for step, score in scores.items():
        metrics = {METRIC: score, OTHER: 1 - score, "val-aux/sums/reward/std@1": 0.3, "timing": 2.0}
        callback.on_validated(step, metrics, lambda: METRIC)


def best(folder: Path) -> tuple[int, float]:
    facts = json.loads((folder / "best" / "relex.json").read_text())
    assert facts["metric"] == METRIC
    return facts["step"], facts["score"]


def test_the_best_is_the_highest_and_of_equal_ones_the_earliest() -> None:
    scores = [Validated(step, METRIC, {METRIC: score, OTHER: -score}) for step, score in ((0, 0.2), (5, 0.7), (9, 0.7))]
    scores += [Validated(12, METRIC, {METRIC: math.nan}), Validated(15, None, {})]
    assert best_of(scores)[0].step == 5
    assert best_of(scores, OTHER)[1:] == (OTHER, -0.2)
    for some, metric, says in (
        (scores, "val-core/x/acc/mean@1", "has val-core/x"),
        ([], None, "has a metric to decide by"),
    ):
        with pytest.raises(ValueError, match=says):
            best_of(some, metric)


def test_every_validation_is_kept_and_only_with_keep_best_weights(tmp_path: Path) -> None:
    """Also after the last cut; those of steps that are gone are dropped."""
    callback, workers = started(tmp_path, recut_every=30)
    validated(callback, {0: 0.3})
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host(LOSES))
    assert not callback.active
    validated(callback, {CUT: 0.5, 8: math.nan, 12: 0.6})
    assert "relex_keep" not in workers.calls
    assert not (tmp_path / "best").exists()
    kept = read_scores(tmp_path / FILE)
    assert [one.step for one in kept] == [0, CUT, 8, 12]
    assert kept[1] == Validated(CUT, METRIC, {METRIC: 0.5, OTHER: 0.5})
    assert math.isnan(kept[2].metrics[METRIC])
    for step, steps in ((10, [0, CUT, 8]), (6, [0, CUT])):
        resumed, _ = started(tmp_path, Workers(tmp_path), step=step, recut_every=30)
        assert [one.step for one in read_scores(tmp_path / FILE)] == steps
    validated(resumed, {6: 0.1})
    assert [one.step for one in read_scores(tmp_path / FILE)] == [0, CUT, 6]
    (tmp_path / FILE).write_text('{"step": 1}\n')
    with pytest.raises(TrajectoryError, match=r"validations.jsonl, line 1 lacks metric"):
        started(tmp_path, Workers(tmp_path), step=6)


@pytest.mark.parametrize("record", ["window", "run"])
def test_the_best_weights_are_kept_to_the_end(tmp_path: Path, record: str) -> None:
    callback, workers = started(tmp_path, record=record, keep_best=True, recut_every=30)
    assert workers.setup.predictions == 1 + 1 + 2
    validated(callback, {0: 0.3})
    assert best(tmp_path) == (0, 0.3)
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host(LOSES))
    assert "relex_stop" not in workers.calls
    for step, score, expected in (
        (8, 0.5, (8, 0.5)),
        (12, 0.5, (8, 0.5)),
        (16, math.nan, (8, 0.5)),
        (20, 0.6, (20, 0.6)),
    ):
        validated(callback, {step: score})
        assert best(tmp_path) == expected

    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best", "best-step_20"]
    assert (tmp_path / "best").is_symlink()
    resumed, again = started(tmp_path, Workers(tmp_path), step=10, record=record, keep_best=True, recut_every=30)
    assert "relex_open" in again.calls  # it needs the ranks, whatever is recorded
    validated(resumed, {10: 0.55, 12: 0.7})
    assert best(tmp_path) == (12, 0.7)
    assert again.calls.count("relex_keep") == 1


def test_a_write_that_fails_leaves_the_old_best_and_switches_relex_off(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, keep_best=True)
    validated(callback, {0: 0.3})
    failing = Workers(tmp_path, fails="relex_keep")
    callback._ranks._workers = failing
    validated(callback, {5: 0.5, 10: 0.6})
    assert best(tmp_path) == (0, 0.3)
    assert failing.calls == ["relex_keep", "relex_stop"]
    assert not callback.active
    assert train(callback, 6, STEPS) is None
