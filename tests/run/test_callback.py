"""The driver's decisions, with stand-ins for the ranks and for the trainer (real ones: tests/integration)."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_ins import CUT, METRIC, STEPS, Host, Workers, config, report, started, train
from wandb_mock import WandbMock

from relex_verl.run.callback import RelexCallback
from relex_verl.run.config import ConfigError
from relex_verl.run.ranks import RelexError
from relex_verl.run.validation import ValidationTimeout
from relex_verl.trajectory.index import TrajectoryError

OLD_REPORT = Path(__file__).parents[1] / "golden" / "report_0_1_0.json"
WINS = {CUT: 0.5, 20: 0.9}
LOSES = {CUT: 0.7, 6: 0.6, 20: 0.1}


def test_a_winner_is_recommended_and_stops_the_run(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="stop")
    train(callback, 1, CUT)
    assert callback.wants_scores
    host = Host(WINS)
    metrics = callback.on_rollout_ready(CUT, host)
    found = report(tmp_path)
    assert found["advice"]["action"] == "stop"
    assert found["advice"]["reason"].startswith("Stop: relex-step_")
    assert found["steps_saved"] == 20 - CUT
    assert found["metrics"] == {"relex/changed_share": 0.1, "relex/drift": None}
    assert host.done == ["restore", "end"]
    assert host.asked[0] == "observed"
    assert len(host.asked) <= 1 + callback.config.max_candidates
    recommended = json.loads((tmp_path / "recommended" / "relex.json").read_text())
    assert f"relex-step_{recommended['target']}" == found["advice"]["target"]
    assert metrics[f"relex/val/relex-step_20/{METRIC}"] == pytest.approx(0.9, abs=0.05)
    assert metrics["relex/val/relex-step_20/seconds"] == 1.0
    assert metrics["relex/val/seconds"] == len(host.asked)
    assert not callback.active
    assert workers.calls[-1] == "relex_stop"


def test_a_run_that_skips_the_step_of_its_cut_is_cut_at_the_next(tmp_path: Path) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, CUT - 1)
    train(callback, CUT + 2, CUT + 2)
    assert callback.wants_scores
    callback.on_rollout_ready(CUT + 2, Host(WINS))
    assert report(tmp_path)["t_cut"] == CUT + 2


def test_advise_does_not_stop_the_run(tmp_path: Path) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, CUT)
    host = Host(WINS)
    callback.on_rollout_ready(CUT, host)
    assert host.done == ["restore"]


def test_a_loser_is_not_recommended_and_the_run_is_cut_again(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="stop")
    train(callback, 1, CUT)
    host = Host(LOSES)
    callback.on_rollout_ready(CUT, host)
    first = report(tmp_path)
    assert first["advice"]["action"] == "keep_training"
    assert first["advice"]["target"] is None
    assert first["steps_saved"] == 0
    held, *losers = first["validation_scores"]
    assert losers[0]["score"] < held["score"]
    assert not (tmp_path / "recommended").exists()
    assert host.done == ["restore"]
    assert callback.plan.t_cut == 2 * CUT
    train(callback, CUT + 1, 2 * CUT)
    callback.on_rollout_ready(2 * CUT, Host({8: 0.5, 20: 0.9}, cut=8))
    second = report(tmp_path)
    assert second["advice"]["action"] == "stop"
    assert [cut["t_cut"] for cut in second["earlier_cuts"]] == [CUT]
    assert second["earlier_cuts"][0]["validation_scores"] == first["validation_scores"]
    assert second["earlier_cuts"][0]["advice"] == first["advice"]
    assert workers.calls.count("relex_fit") == 2
    # Both cuts' samples are kept; the first one's report as well.
    for cut, of in ((CUT, first), (2 * CUT, second)):
        folder = tmp_path / "scores" / f"cut_{cut}"
        assert json.loads((folder / "report.json").read_text()) == of
        for row in of["validation_scores"]:
            assert len(json.loads((folder / f"{row['name']}.json").read_text())) == row["prompts"]


def test_each_cut_must_pass_a_stricter_test(tmp_path: Path) -> None:
    """Half of what is left of alpha at every cut, all of it at one that no other can follow."""
    callback, _ = started(tmp_path, steps=14)
    levels, following = [], []
    for cut in (4, 8, 12):
        train(callback, cut - 3, cut)
        callback.on_rollout_ready(cut, Host({cut: 0.7, 20: 0.1}, cut=cut))
        levels.append(report(tmp_path)["advice"]["alpha"])
        following.append(report(tmp_path).get("next_cut"))
    assert following == [8, 12, None]
    assert levels == pytest.approx([0.025, 0.0125, 0.0125])
    assert sum(levels) == pytest.approx(0.05)
    assert not callback.active


def test_a_failing_validation_leaves_the_advice_unscored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, _ = started(tmp_path, on_cut="stop")
    train(callback, 1, CUT)
    host = Host({}, fails=ValidationTimeout("hung"))
    assert callback.on_rollout_ready(CUT, host) == {}
    assert report(tmp_path)["advice"]["action"] == "unscored"
    assert host.done == ["restore"]
    assert "nothing is recommended" in caplog.text
    assert not callback.active


def test_policy_weights_that_cannot_be_given_back_end_the_run(tmp_path: Path) -> None:
    """Whatever on_error says: the next step would be sampled from a prediction."""
    callback, _ = started(tmp_path)
    train(callback, 1, CUT)
    host = Host(WINS)
    host.relex_restore = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(RelexError, match="could not be given the policy's weights back") as error:
        callback.on_rollout_ready(CUT, host)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_interrupt_while_scoring_restores_as_well(tmp_path: Path) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, CUT)
    host = Host(WINS, fails=KeyboardInterrupt())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        callback.on_rollout_ready(CUT, host)
    assert host.done == ["restore"]


class OutOfInk:
    """W&B's module, which fails at whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise OSError("out of ink")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("figures", "drawing the scores failed"),
        ("report.html", "writing report.html failed"),
        ("wandb", "logging to W&B failed"),
    ],
)
def test_pictures_pages_and_wandb_cost_no_decision(
    broken: str, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, _ = started(tmp_path, on_cut="stop")
    train(callback, 1, CUT, {"wandb": OutOfInk() if broken == "wandb" else WandbMock()})
    if broken == "figures":
        (tmp_path / broken).write_text("a file where the pictures' folder should be")
    if broken == "report.html":
        (tmp_path / broken).mkdir()
    host = Host(WINS)
    metrics = callback.on_rollout_ready(CUT, host)
    assert host.done == ["restore", "end"]
    assert report(tmp_path)["advice"]["action"] == "stop"
    assert metrics
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning == f"RELEX: {says}; the decision stands"


def test_a_last_checkpoint_that_fails_is_told_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback, _ = started(tmp_path, on_cut="stop")
    train(callback, 1, CUT)
    host = Host(WINS)
    host.relex_end_training = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    assert callback.on_rollout_ready(CUT, host)
    assert "the last checkpoint failed" in caplog.text


@pytest.mark.parametrize("fails", ["relex_observe", "relex_fit", "relex_write"])
def test_an_error_is_logged_once_and_switches_relex_off(
    tmp_path: Path, fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    callback, workers = started(tmp_path, Workers(tmp_path, fails))
    with caplog.at_level(logging.ERROR):
        train(callback, 1, CUT)
    assert not callback.active
    assert not callback.wants_scores
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == [
        "RELEX failed and is switched off; the training goes on without it"
    ]
    assert "rank 1" in caplog.text
    assert "disk on fire" in caplog.text
    assert workers.calls[-1] == "relex_stop"
    assert callback.on_step_end(5, SimpleNamespace(logger={})) == {}


def test_on_error_raise(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, Workers(tmp_path, "relex_observe"), on_error="raise")
    with pytest.raises(RelexError, match="rank 1, relex_observe: disk on fire"):
        train(callback, 1, CUT)


@pytest.mark.parametrize(
    ("method", "kind", "error"),
    [
        ("relex_start", "BudgetError", RuntimeError),
        ("relex_open", "TrajectoryError", TrajectoryError),
        ("relex_start", "NotImplementedError", RelexError),
        ("relex_open", "PermissionError", RelexError),
    ],
)
def test_a_rank_that_fails_before_the_first_step_refuses_the_run(
    tmp_path: Path, method: str, kind: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="disk on fire"):
        started(tmp_path, Workers(tmp_path, method, kind), on_error="disable")


def test_only_the_configured_trajectory_is_planned(tmp_path: Path) -> None:
    """bf16 is not refused for what fp32 could not do: rows at every step, not at each second."""
    _, workers = started(tmp_path, trajectory="bf16", observe_every="auto", t_cut=30, rank=20, targets=[60], steps=60)
    assert {kind: (plan.rows, plan.observe_every) for kind, plan in workers.setup.plans.items()} == {"bf16": (30, 1)}


def test_ranks_are_told_where_the_driver_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative folder means the driver's: a worker on another node may stand somewhere else."""
    monkeypatch.chdir(tmp_path)
    _, workers = started(tmp_path / "runs" / "relex", output_dir="runs/relex")
    monkeypatch.chdir("/")
    assert workers.setup.output_dir == tmp_path / "runs" / "relex"


def test_a_fallback_is_planned_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "relex_verl"):
        callback, workers = started(
            tmp_path,
            Workers(tmp_path, reason="no master weights"),
            observe_every="auto",
            t_cut=32,
            targets=[60],
            steps=60,
        )
    assert {kind: plan.rows for kind, plan in workers.setup.plans.items()} == {"fp32-int8": 16, "bf16": 32}
    assert callback.plan.rows == 32
    assert "relex.trajectory=fp32 becomes bf16: no master weights" in caplog.text
    assert "RELEX: needs 3 GiB" in caplog.text


def test_a_sketch_of_rounded_weights_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    started(tmp_path, Workers(tmp_path, reason="no master weights"), trajectory="sketch")
    assert "relex.trajectory=sketch follows bfloat16 weights: no master weights" in caplog.text


@pytest.mark.parametrize(
    ("trajectory", "overlap", "saves"), [("sketch", False, 1), ("fp32", False, 0), ("fp32", True, 1)]
)
def test_what_is_not_on_disk_is_saved_with_verls_checkpoints(
    tmp_path: Path, trajectory: str, overlap: bool, saves: int
) -> None:
    """A sketch, and a row that is under way."""
    callback, workers = started(tmp_path, trajectory=trajectory, overlap=overlap)
    train(callback, 1, 2)
    callback.on_save(2)
    assert workers.calls.count("relex_save") == saves
    callback.active = False
    callback.on_save(3)
    assert workers.calls.count("relex_save") == saves


def test_without_scoring(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, validate_targets=False)
    train(callback, 1, CUT)
    assert not callback.wants_scores
    assert report(tmp_path)["advice"]["action"] == "unscored"
    assert not callback.active


# Resume


def test_a_cut_without_a_verdict_is_scored_before_training_goes_on(tmp_path: Path) -> None:
    """verl saves between the fit and the scores; the run is killed while it scores."""
    train(started(tmp_path)[0], 1, CUT)
    callback, workers = started(tmp_path, step=CUT, on_cut="stop")
    assert callback.wants_scores
    assert workers.calls == ["relex_start", "relex_open", "relex_fit", "relex_write"]
    host = Host(WINS)
    metrics = callback.on_train_begin(CUT, host, SimpleNamespace(logger={}))
    assert metrics[f"relex/val/observed/{METRIC}"] == pytest.approx(0.5, abs=0.05)
    assert report(tmp_path)["advice"]["action"] == "stop"
    assert host.done == ["restore", "end"]


def test_a_cut_with_a_verdict_is_not_scored_again(tmp_path: Path) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host(LOSES))
    resumed, _ = started(tmp_path, step=CUT)
    assert not resumed.wants_scores
    assert resumed.plan.t_cut == 2 * CUT
    train(resumed, CUT + 1, 2 * CUT)
    resumed.on_rollout_ready(2 * CUT, Host({8: 0.7, 20: 0.1}, cut=8))
    found = report(tmp_path)
    assert [cut["t_cut"] for cut in found["earlier_cuts"]] == [CUT]
    assert found["advice"]["alpha"] == pytest.approx(0.05 / 4)


@pytest.mark.parametrize("fails", [None, ValueError("no reward")])
def test_a_run_with_a_final_verdict_is_not_cut_again(tmp_path: Path, fails: Exception | None) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host(WINS, fails=fails))
    resumed, workers = started(tmp_path, step=CUT + 1)
    assert not resumed.active
    assert "relex_open" not in workers.calls


def test_a_run_that_0_1_0_began_goes_on(tmp_path: Path) -> None:
    """Its report knows no schema_version; what it decided stands."""
    old = json.loads(OLD_REPORT.read_text())
    kept = tmp_path / "scores" / "cut_30" / "report.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(old))
    decided, workers = started(tmp_path, step=31, steps=400, t_cut=30, targets=[60])
    assert not decided.active  # it had won
    assert "relex_open" not in workers.calls
    lost = {**old["advice"], "action": "keep_training", "target": None}
    kept.write_text(json.dumps({**old, "advice": lost}))
    resumed, _ = started(tmp_path, step=31, steps=400, t_cut=30, targets=[60])
    assert resumed.plan.t_cut == 60
    train(resumed, 32, 60)
    resumed.on_rollout_ready(60, Host({60: 0.5, 120: 0.9}, cut=60))
    assert report(tmp_path)["earlier_cuts"] == [
        {"t_cut": 30, "advice": lost, "validation_scores": old["validation_scores"], "screened_out": {}}
    ]
    assert report(tmp_path)["advice"]["alpha"] == pytest.approx(0.05 / 4)


def test_a_cut_that_is_made_again_forgets_what_it_gave_before(tmp_path: Path) -> None:
    """Resumed from before the cut, after a win: the new weights lose, so nothing may stay recommended."""
    callback, _ = started(tmp_path)
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host(WINS))
    assert (tmp_path / "recommended").exists()
    resumed, _ = started(tmp_path, step=2)
    train(resumed, 3, CUT)
    assert not (tmp_path / "scores" / f"cut_{CUT}").exists()
    resumed.on_rollout_ready(CUT, Host(LOSES))
    assert report(tmp_path)["advice"]["action"] == "keep_training"
    assert report(tmp_path)["earlier_cuts"] == []
    assert not (tmp_path / "recommended").exists()


def test_a_run_that_resumes_behind_its_cut_goes_on_to_the_next(tmp_path: Path) -> None:
    callback, _ = started(tmp_path, step=CUT + 1)
    assert callback.plan.t_cut == 2 * CUT
    late, workers = started(tmp_path / "late", step=18)
    assert not late.active
    assert workers.calls[-1] == "relex_stop"


def test_a_run_that_resumes_at_its_cut_without_rows_goes_on_to_the_next(tmp_path: Path) -> None:
    """RELEX was added to it only now."""
    callback, workers = started(tmp_path, step=CUT)
    assert callback.active
    assert not callback.wants_scores
    assert callback.plan.t_cut == 2 * CUT
    assert "relex_fit" not in workers.calls


# The folder: see test_output


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, 2)
    with pytest.raises(ConfigError, match=r"relex\.output_dir=.*another run.*resume_mode=disable"):
        started(tmp_path, resume_mode="disable")
    with pytest.raises(ConfigError, match="experiment 'e' there, 'other' here"):
        started(tmp_path, experiment="other")


def test_a_restart_before_the_first_checkpoint_sets_the_attempt_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback, _ = started(tmp_path)
    train(callback, 1, 2)
    _, workers = started(tmp_path)
    assert workers.steps == []
    (aside,) = tmp_path.glob("superseded-*")
    assert json.loads((aside / "trajectory" / "index.json").read_text())["windows"][0]["steps"] == [1, 2]
    assert "set aside" in caplog.text


def test_a_driver_that_does_not_see_the_folder_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For a minute, until which a shared file system may show the folder.
    monkeypatch.setattr("relex_verl.run.callback.appears", lambda path: False)
    with pytest.raises(TrajectoryError, match="shared file system"):
        started(tmp_path)


# The end


@pytest.mark.parametrize(
    ("last", "says"),
    [
        (2, "ended before the cut at step 4 was scored"),
        (CUT, "ended before another cut at step 8. Keep training: relex-step_"),
        (20, None),
    ],
)
def test_the_end_is_told_as_it_was(
    tmp_path: Path, last: int, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    callback, _ = started(tmp_path)
    for step in range(1, last + 1):
        train(callback, step, step)
        if callback.wants_scores:
            callback.on_rollout_ready(step, Host({step: 0.7, 100: 0.1}, cut=step))
    caplog.clear()
    with caplog.at_level(logging.INFO, "relex_verl"):
        callback.on_train_end()
    assert (says in caplog.text) if says else not caplog.records
    assert not callback.active


def test_length_unknown_to_the_configuration_is_checked_when_verl_knows_it(tmp_path: Path) -> None:
    """verl's default leaves trainer.total_training_steps null: the epochs decide, and workers start afterwards."""
    callback = RelexCallback(*config(tmp_path, t_cut=30))
    with pytest.raises(ConfigError, match=r"relex\.t_cut=30.*the run has 20"):
        callback.on_length_known(20)
    with pytest.raises(ConfigError, match=r"relex\.targets=3.*not after the cut at 4"):
        RelexCallback(*config(tmp_path, targets=[3])).on_length_known(20)


def test_a_run_is_recorded_after_its_last_cut_and_goes_on_so(tmp_path: Path) -> None:
    """To the last step; from verl's checkpoint again without the rows in memory, and behind a cut that is not made again."""
    callback, workers = started(tmp_path, record="run", recut_every=30)
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host(LOSES))
    assert (callback.active, callback.wants_scores, workers.recording) == (True, False, True)
    train(callback, CUT + 1, 12)
    assert workers.steps == list(range(1, 13))
    assert "relex_stop" not in workers.calls
    for step in (10, 2):  # killed after the cut, and before it
        resumed, workers = started(tmp_path, Workers(tmp_path), step=step, record="run", recut_every=30)
        assert workers.recording == (step == 10)
        train(resumed, step + 1, CUT if step < CUT else STEPS)
    resumed.on_rollout_ready(CUT, Host(LOSES))
    train(resumed, CUT + 1, STEPS)
    assert workers.steps == list(range(1, STEPS + 1))
    resumed.on_train_end()
    assert not resumed.active


def test_a_run_without_a_cut_is_only_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "relex_verl")
    node = {"t_cut": None, "record": "run", "targets": [1.0], "observe_every": 3}
    callback, workers = started(tmp_path, **node)
    assert workers.setup.predictions == 0
    assert workers.recording
    train(callback, 1, STEPS)
    assert workers.steps == [3, 6, 9, 12, 15, 18, 20]
    callback.on_train_end()
    assert "the run is recorded in" in caplog.text
    assert "relex_fit" not in workers.calls
    failing = Workers(tmp_path, fails="relex_observe")
    resumed, _ = started(tmp_path, failing, step=9, **node)
    train(resumed, 10, STEPS)
    assert (resumed.active, failing.calls.count("relex_observe"), failing.calls[-1]) == (False, 1, "relex_stop")


def test_the_last_window_of_a_run_that_jumps_is_recorded(tmp_path: Path) -> None:
    callback, workers = started(tmp_path, on_cut="jump", max_jumps=1, jump_undo=False, record="run")
    train(callback, 1, CUT)
    callback.on_rollout_ready(CUT, Host({CUT: 0.5, 6: 0.9}))
    assert workers.jumps
    assert workers.recording
    train(callback, CUT + 1, STEPS)
    assert workers.steps[-1] == STEPS
