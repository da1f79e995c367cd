"""The paper's analyses as commands: diagnose, compare, backtest, sweep."""

import json
import shutil

import pytest
from pictures import check_png
from shell import STEPS, call, finished, json_of, same, weights

__all__ = ["finished"]

NAME = "model.layers.1.mlp.up_proj.weight"


def test_extrapolate_and_sweep_agree_and_the_manifest_can_be_walked(finished, tmp_path):
    call("extrapolate", finished / "trajectory", "--t-cut", 4, "--target", "8,12", "--out", tmp_path / "e")
    grid = ("sweep", finished / "trajectory", "--t-cut", "3,4", "--target", "4,8,12", "--out", tmp_path / "s")
    assert len(json_of(*grid)["predictions"]) == 5
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    rows = {(row["t_cut"], row["target"]): tmp_path / "s" / row["path"] for row in manifest["predictions"]}
    assert sorted(rows) == [(3, 4), (3, 8), (3, 12), (4, 8), (4, 12)]
    assert json.loads((rows[4, 8] / "relex.json").read_text())["observed_steps"] == [1, 2, 3, 4]
    assert same(rows[4, 8], tmp_path / "e/relex-step_8")
    before = (rows[3, 12] / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(rows[4, 12])
    assert call(*grid).exit_code == 0
    assert (rows[3, 12] / "model.safetensors").stat().st_mtime_ns == before
    assert (rows[4, 12] / "relex.json").exists()


def test_a_sweep_from_later_rows(finished, tmp_path):
    common = ("--target", 12, "--fit-from", 2)
    [row] = json_of("sweep", finished / "trajectory", "--t-cut", "4", *common, "--out", tmp_path / "s")["predictions"]
    call("extrapolate", finished / "trajectory", "--t-cut", 4, *common, "--out", tmp_path / "e")
    call("extrapolate", finished / "trajectory", "--t-cut", 4, "--target", 12, "--out", tmp_path / "all")
    assert row["fit_from"] == 2
    assert same(tmp_path / "s" / row["path"], tmp_path / "e/relex-step_12")
    assert not same(tmp_path / "s" / row["path"], tmp_path / "all/relex-step_12")


def test_diagnose_and_backtest(finished, tmp_path):
    found = json_of("diagnose", finished / "trajectory", "--out", tmp_path / "d", "--target", "20")
    assert {"coefficients", "components", "spectrum", "r2_by_layer"} <= set(found["figures"])
    frozen = next(row for row in found["tensors"] if row["tensor"] == "model.norm.weight")
    assert frozen["line_r2"] is None
    pictures = list((tmp_path / "d").glob("*.png"))
    assert len(list((tmp_path / "d").glob("*.svg"))) == len(pictures) >= 5
    for picture in pictures:
        check_png(picture)
    printed = call("diagnose", finished / "trajectory").stdout
    assert "random walk" in printed
    assert "model.layers.1.post_attention_layernorm.weight" in printed
    rows = json_of("backtest", finished / "trajectory", "--out", tmp_path / "b")["rows"]
    assert {row["method"] for row in rows} == {"relex", "anchored", "two-point"}
    check_png(tmp_path / "b/backtest.png")
    assert "keeping" in call("backtest", finished / "trajectory").stdout


def test_diagnose_draws_the_tensors_that_are_named(finished, tmp_path):
    chosen = f"{NAME},0.mlp.gate_proj"
    found = json_of("diagnose", finished / "trajectory", "--out", tmp_path / "d", "--tensor", chosen, "--target", 9)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert {f"components_{NAME}", f"components_{gate}", "coefficients"} <= set(found["figures"])
    drawn = (tmp_path / "d/coefficients.svg").read_text()
    assert NAME in drawn
    assert gate in drawn
    assert "embed_tokens" not in drawn
    assert gate in (tmp_path / f"d/components_{gate}.svg").read_text()


def test_rows_before_fit_from_count_nothing(finished):
    rows = json_of("diagnose", finished / "trajectory", "--fit-from", 3)
    assert rows["steps"] == [3, 4, 6]
    tested = json_of("backtest", finished / "trajectory", "--fit-from", 3, "--method", "relex")["rows"]
    assert [row["prefix"] for row in tested] == [4]


def row_of(found, method, step):
    return next(row for row in found["tensors"] if (row["method"], row["step"]) == (method, step))


def test_compare_measures_what_dense_vectors_say(finished, tmp_path):
    arguments = ("compare", finished / "trajectory", "--checkpoints", finished / "run", "--t-cut", 4)
    found = json_of(*arguments, "--out", tmp_path / "c")
    assert len(found["figures"]) == 2
    call("extrapolate", finished / "trajectory", "--t-cut", 4, "--target", 8, "--out", tmp_path / "e")
    places = finished / "base", finished / "run/global_step_8", tmp_path / "e/relex-step_8"
    base, true, guess = (weights(folder)[NAME].double() for folder in places)
    one, two = (true - base).flatten(), (guess - base).flatten()
    row, at = row_of(found, "relex", 8), found["names"].index(NAME)
    assert row["cosine"][at] == pytest.approx(float(one @ two / one.norm() / two.norm()), rel=0.01)
    assert row["ratio"][at] == pytest.approx(float(two.norm() / one.norm()), rel=0.01)
    assert "reconstruction" in call(*arguments).stdout


@pytest.mark.parametrize("fit_from", [1, 2])
def test_the_truth_may_be_the_trajectorys_own_later_steps(finished, fit_from):
    common = ("--t-cut", 4, "--method", "relex,hold", "--fit-from", fit_from)
    own = json_of("compare", finished / "whole", *common)
    from_files = json_of("compare", finished / "whole", *common, "--checkpoints", finished / "run")
    assert [(row["method"], row["step"]) for row in own["rows"]] == [
        (row["method"], row["step"]) for row in from_files["rows"]
    ]
    for here, there in zip(own["tensors"], from_files["tensors"], strict=True):
        for key in ("cosine", "ratio"):
            for ours, theirs in zip(here[key], there[key], strict=True):
                assert ours is theirs is None or ours == pytest.approx(theirs, rel=1e-6), (here["method"], here["step"])
    assert {row["step"] for row in own["rows"] if row["method"] == "relex"} == {6, 8}


def test_the_reconstruction_is_of_the_whole_run_and_a_projection(finished, tmp_path):
    """Figure 6 draws it beside the extrapolation, at the same steps."""
    found = json_of("compare", finished / "whole", "--t-cut", 4)
    rebuilt = [row for row in found["rows"] if row["method"] == "reconstruction"]
    assert [row["step"] for row in rebuilt] == list(STEPS)
    assert all(row["cosine"] == pytest.approx(row["ratio"]) for row in rebuilt)
    assert call("reconstruct", finished / "whole", "--step", 6, "--out", tmp_path / "r").exit_code == 0
    places = finished / "base", finished / "run/global_step_6", tmp_path / "r"
    base, true, rank_one = (weights(folder)[NAME].double() for folder in places)
    one, two = (true - base).flatten(), (rank_one - base).flatten()
    at = found["names"].index(NAME)
    assert row_of(found, "reconstruction", 6)["cosine"][at] == pytest.approx(
        float(one @ two / one.norm() / two.norm()), rel=0.01
    )
    some = json_of("compare", finished / "whole", "--t-cut", 4, "--reconstruct-cut", 6, "--steps", "6-8")["rows"]
    assert {(row["method"], row["step"]) for row in some} == {
        ("relex", 6), ("hold", 6), ("relex", 8), ("hold", 8), ("reconstruction", 6),
    }  # fmt: skip
