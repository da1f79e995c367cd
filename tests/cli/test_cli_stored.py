"""From a trajectory on disk: info, checkout, extrapolate, reconstruct; and what a sketch of it can still give."""

import json
import re
import shutil

import pytest
import torch
from shell import call, finished, json_of, refused, same, sketch, weights

from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

__all__ = ["finished", "sketch"]


def test_info_and_checkout(finished, tmp_path):
    assert json_of("info", finished / "trajectory")["steps"] == [1, 2, 3, 4, 6]
    assert "random walk" in call("info", finished / "trajectory").stdout
    assert json_of("checkout", finished / "trajectory", "--step", 4, "--out", tmp_path / "c")["max_error"] == 0
    assert same(tmp_path / "c", finished / "run/global_step_4")


def test_the_best_step_is_checked_out(finished, tmp_path):
    """By the scores beside the trajectory: the highest, the earliest of equal ones, the last observed up to it."""
    shutil.copytree(finished / "trajectory", tmp_path / "run/trajectory")
    command = ("checkout", tmp_path / "run/trajectory", "--best", "--out", tmp_path / "c")
    assert "no validation of this run has a metric to decide by" in refused(*command)
    one, other = "val-core/a/acc/mean@1", "val-core/b/acc/mean@1"
    scores = {0: (0.1, 0.9), 2: (0.5, 0.2), 4: (0.7, 0.3), 5: (0.7, 0.95), 6: (0.6, 0.1)}
    lines = [{"step": n, "metric": one, "metrics": {one: a, other: b}} for n, (a, b) in scores.items()]
    (tmp_path / "run/validations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = json_of(*command)
    assert (found["step"], found["best"]) == (4, {"step": 4, "metric": one, "score": 0.7})
    assert same(tmp_path / "c", finished / "run/global_step_4")
    facts = json.loads((tmp_path / "c/relex.json").read_text())
    assert (facts["metric"], facts["score"]) == (one, 0.7)
    said = call(*command, "--metric", other).stdout.split("\n")
    assert said[0] == f"best: step 5, {other} 0.95"
    assert said[1].startswith("step 5 was not observed; step 4 is the last before it that was")
    assert "score" not in json.loads((tmp_path / "c/relex.json").read_text())
    assert "has val-core/c/acc/mean@1; there: val-core/a" in refused(*command, "--metric", "val-core/c/acc/mean@1")
    assert "leave out --step" in refused(*command, "--step", 4)
    assert "give --step N, or --best" in refused(*command[:2], "--out", tmp_path / "c")


@pytest.mark.parametrize("command", ["checkout", "reconstruct"])
def test_nobodys_folder_is_overwritten(finished, tmp_path, command, monkeypatch):
    trajectory = finished / "trajectory"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    for folder in (tmp_path / "mine", tmp_path, finished, trajectory):
        assert "no checkpoint that relex-verl wrote" in refused(command, trajectory, "--step", 4, "--out", folder)
    before = weights(finished / "base")
    assert "is the base model itself" in refused(command, trajectory, "--step", 4, "--out", finished / "base")
    assert all(torch.equal(before[name], now) for name, now in weights(finished / "base").items())
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"
    monkeypatch.chdir(tmp_path / "mine")
    (tmp_path / "mine/notes.txt").unlink()
    assert call(command, trajectory, "--step", 4, "--out", ".").exit_code == 0
    assert call(command, trajectory, "--step", 3, "--out", tmp_path / "mine").exit_code == 0  # ours: replaced
    assert json.loads((tmp_path / "mine/relex.json").read_text())["step"] == 3


def test_a_prediction_is_not_overwritten_by_one_that_was_made_otherwise(finished, tmp_path):
    arguments = ("extrapolate", finished / "trajectory", "--t-cut", 4, "--target", 8, "--out", tmp_path)
    assert call(*arguments).exit_code == 0
    before = weights(tmp_path / "relex-step_8")
    for more, says in ((("--rank", 2), "rank 1 there, 2 here"), (("--fit-from", 2), "fit_from 1 there, 2 here")):
        assert f"holds another prediction ({says}" in refused(*arguments, *more)
    again = ("extrapolate", finished / "trajectory", "--t-cut", 3, "--target", 8, "--out", tmp_path)
    assert "holds another prediction (t_cut 4 there, 3 here" in refused(*again)
    assert all(torch.equal(before[name], now) for name, now in weights(tmp_path / "relex-step_8").items())
    assert call(*arguments).exit_code == 0


def test_reconstruct_at_full_rank_is_the_checkpoint(finished, tmp_path):
    trajectory = finished / "trajectory"
    assert call("reconstruct", trajectory, "--step", 4, "--rank", 5, "--out", tmp_path / "r").exit_code == 0
    true, full = weights(finished / "run/global_step_4"), weights(tmp_path / "r")
    assert all(torch.allclose(full[name].float(), true[name].float(), atol=1e-6) for name in true)
    assert call("reconstruct", trajectory, "--step", 4, "--out", tmp_path / "r1").exit_code == 0
    one = weights(tmp_path / "r1")
    assert any(not torch.equal(one[name], true[name]) for name in true)


def test_provenance_names_absolute_places(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished)
    call("extrapolate", "trajectory", "--t-cut", 4, "--target", 8, "--out", tmp_path)
    call("checkout", "trajectory", "--step", 4, "--out", tmp_path / "c")
    for folder in ("relex-step_8", "c"):
        assert json.loads((tmp_path / folder / "relex.json").read_text())["trajectory"] == str(finished / "trajectory")


# ---------------------------------------------------------------- a sketch


def test_what_a_sketch_gives(finished, sketch, tmp_path):
    figures = json_of("info", sketch)["figures"]
    assert 0 < figures["explained_variance"]["mean"] <= 1
    assert figures["line_r2"] == {}
    assert "explained variance" in call("info", sketch).stdout
    arguments = ("--t-cut", 6, "--target", "9,20", "--method", "relex,raw-ols,poly", "--out", tmp_path / "e")
    assert len(json_of("extrapolate", sketch, *arguments)["predictions"]) == 6
    # raw-ols is a polynomial of the rows: a sketch loses nothing of it but float32 digits.
    line = ("--t-cut", 6, "--target", 20, "--method", "raw-ols", "--out", tmp_path / "rows")
    call("extrapolate", finished / "trajectory", *line)
    here, there = weights(tmp_path / "e/raw-ols-step_20"), weights(tmp_path / "rows/raw-ols-step_20")
    # The rows are bfloat16, the sketch is of float32 weights: their roundings differ, the line does not.
    assert all(torch.allclose(here[name].float(), there[name].float(), atol=2e-3) for name in here)
    assert json_of("reconstruct", sketch, "--step", 4, "--out", tmp_path / "r")["step"] == 4
    swept = json_of("sweep", sketch, "--t-cut", 6, "--target", "9,20", "--out", tmp_path / "s")["predictions"]
    assert same(tmp_path / "s" / swept[0]["path"], tmp_path / "e/relex-step_9")
    compared = json_of("compare", sketch, "--t-cut", 6, "--method", "relex", "--checkpoints", finished / "run")
    assert [(row["method"], row["step"]) for row in compared["rows"]] == [("relex", 8)]
    assert compared["rows"][0]["cosine"] > 0.5
    found = json_of("diagnose", sketch, "--out", tmp_path / "d")
    assert {"coefficients", "explained_variance_by_layer"} == set(found["figures"])
    energy = replay.window(Trajectory(sketch)).energy_L
    assert energy is not None
    assert call("checkout", sketch, "--step", 0, "--out", tmp_path / "base").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("checkout SKETCH --step 4 --out OUT", "is a sketch"),
        (
            "extrapolate SKETCH --t-cut 6 --target 9 --method relex,anchored --out OUT",
            "cannot be predicted from a sketch",
        ),
        ("extrapolate SKETCH --t-cut 6 --target 9 --method hold --out OUT", "cannot be predicted from a sketch"),
        ("extrapolate SKETCH --t-cut 6 --target 9 --fit-from 3 --out OUT", "a sketch cannot leave out steps"),
        ("extrapolate SKETCH --t-cut 4 --target 9 --out OUT", "can be cut only where it was stored"),
        ("diagnose SKETCH --fit-from 3 --out OUT", "a sketch cannot leave out steps"),
        ("backtest SKETCH --out OUT", "is a sketch"),
        ("compare SKETCH --t-cut 6 --checkpoints RUN --out OUT", "hold cannot be predicted from a sketch"),
        ("baseline transformer SKETCH --t-cut 6 --target 9 --out OUT", "is a sketch"),
        ("baseline weight-extrapolation SKETCH --t-cut 6 --target 9 --out OUT", "is a sketch"),
        ("baseline next SKETCH --t-cut 6 --out OUT", "is a sketch"),
    ],
)
def test_what_a_sketch_cannot_give_is_said_in_one_line(finished, sketch, tmp_path, arguments, says):
    places = {"SKETCH": sketch, "RUN": finished / "run", "OUT": tmp_path / "out"}
    assert says in refused(*(places.get(one, one) for one in arguments.split()))
    assert not re.findall("step_9", " ".join(map(str, (tmp_path / "out").rglob("*anchored*"))))


def test_a_prediction_that_is_no_number_is_refused(finished, tmp_path):
    arguments = ("extrapolate", finished / "trajectory", "--t-cut", 6, "--method", "poly", "--out", tmp_path / "out")
    assert "lm_head.weight: the prediction is not finite in bfloat16" in refused(*arguments, "--target", 2**60)
    assert not list((tmp_path / "out").iterdir())
