"""A run that ends at its cut: properly, with everything that a user needs to go on from there."""

import json
from math import ceil
from pathlib import Path

import pytest
from harness import METRIC, VALIDATION_PROMPTS, Run, kill_as_soon_as, load, run
from wandb_files import records

STEPS, CUT = 6, 2
RELEX = [f"relex.t_cut={CUT}", f"relex.targets=[{STEPS}]", "relex.max_candidates=1", "relex.on_cut=stop"]


def disturbed(out: Path, how: str, after: int = 0) -> dict[str, str]:
    """See faults.py."""
    faults = {"FAULT_SCORING": how, "FAULT_AFTER": str(after), "FAULT_MARKER": str(out / "scoring")}
    return {"VERL_USE_EXTERNAL_MODULES": "verl_cpu,faults", **faults}


def exit_codes(out: Path) -> list[int]:
    """Of the W&B runs, as their own offline files say."""
    written = (record for path in sorted((out / "wandb").rglob("run-*.wandb")) for record in records(path))
    return [record.exit.exit_code for record in written if record.HasField("exit")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Killed between its cut and the verdict, and started again: loses there, is cut again at step 4, and wins.

    The second start saves no checkpoint by itself, and validates every second step.
    """
    out = tmp_path_factory.mktemp("stop")
    saves = ["trainer.save_freq=1", "trainer.resume_mode=auto"]
    kill_as_soon_as(out / "scoring", out, STEPS, env=disturbed(out, "hang"), relex=RELEX, extra=saves)
    (out / "scoring").unlink()
    assert (out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(CUT)
    assert not (out / "relex" / "report.json").exists()
    extra = ["trainer.save_freq=-1", "trainer.test_freq=2", "trainer.resume_mode=auto"]
    # A prediction of a run this small cannot be relied on to win, so the second cut's is given the full reward.
    return run(out, STEPS, env=disturbed(out, "flatter", after=2), relex=RELEX, extra=extra)


def test_a_cut_that_was_killed_before_its_verdict_is_scored_on_resume(finished: Run) -> None:
    """Before any further step is trained."""
    assert finished.code == 0, finished.log[-3000:]
    assert finished.complaints() == []
    assert f"the cut at step {CUT} has no verdict yet" in finished.log
    assert finished.log.index(f"scoring observed-step_{CUT}") < finished.log.index(f"step:{CUT + 1} ")
    (first,) = finished.report()["earlier_cuts"]
    assert (first["t_cut"], first["advice"]["action"]) == (CUT, "keep_training")
    held, candidate = first["validation_scores"]
    assert finished.metrics[CUT][f"relex/val/observed/{METRIC}"] == held["score"]
    assert finished.metrics[CUT][f"relex/val/relex-step_{STEPS}/{METRIC}"] == candidate["score"]
    assert finished.metrics[CUT][f"relex/val/relex-step_{STEPS}/seconds"] == candidate["seconds"]


def test_a_loser_is_cut_again_with_all_rows(finished: Run) -> None:
    report = finished.report()
    assert report["t_cut"] == 2 * CUT
    assert report["observed_steps"] == [1, 2, 4]  # rows become rarer after the first cut
    scores = finished.out / "relex" / "scores"
    assert {path.name for path in scores.iterdir()} == {f"cut_{CUT}", f"cut_{2 * CUT}"}
    for cut in (CUT, 2 * CUT):
        kept = json.loads((scores / f"cut_{cut}" / f"observed-step_{cut}.json").read_text())
        assert len(kept) == VALIDATION_PROMPTS
        assert all(len(samples) == 1 for samples in kept.values())
        assert (scores / f"cut_{cut}" / "report.html").exists()


def test_a_win_ends_the_run_properly(finished: Run) -> None:
    """verl's loop, its logger and its process; what verl validates after the checkpoint are the policy's weights."""
    assert max(finished.metrics) == 2 * CUT
    checkpoint = finished.out / "checkpoints" / f"global_step_{2 * CUT}"
    assert (checkpoint / "data.pt").exists()
    assert list((checkpoint / "actor").glob("model_world_size_*.pt"))
    assert (finished.out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(2 * CUT)
    assert finished.metrics[2 * CUT][METRIC] == finished.report()["validation_scores"][0]["score"]
    assert exit_codes(finished.out) == [0]  # the killed one left none


def test_the_winner_is_recommended(finished: Run) -> None:
    report = finished.report()
    advice = report["advice"]
    assert (advice["action"], advice["score"]) == ("stop", 1.0), advice
    samples = VALIDATION_PROMPTS * sum(len(cut["validation_scores"]) for cut in (*report["earlier_cuts"], report))
    assert report["scoring"]["samples"] == samples
    assert report["steps_saved"] == STEPS - 2 * CUT - ceil(report["scoring"]["steps"])
    recommended = Path(report["recommended_path"])
    assert recommended == finished.out / "relex" / "recommended"
    winner = load(finished.out / "relex" / "predicted" / advice["target"])
    assert all((tensor == winner[name]).all() for name, tensor in load(recommended).items())
    assert json.loads((recommended / "relex.json").read_text())["t_cut"] == 2 * CUT
