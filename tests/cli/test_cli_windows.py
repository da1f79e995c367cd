"""Commands and functions on the trajectory of a run that jumped after step 4, and undid it after step 8."""

import json

import pytest
import torch
from fakes import DriftingModel, RankSource, tiny_base
from shell import call, json_of, refused, weights

from relex_verl import Trajectory, diagnose, extrapolate, reconstruct
from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS

JUMP = {"method": "anchored", "target": 40, "rank": 2, "fit_from": 1, "optimizer": "reset"}
EXACT = {"bf16": 0.0, "fp32-none": 1e-7, "fp32-int8": 1e-4}


def run(folder, base, kind):
    """The trajectory, and step -> weights as they were trained, and with which the run went on."""
    first = DriftingModel(weights(base), rate=3e-4)
    second, third = (DriftingModel(first.at(step), rate=3e-4) for step in (40, 4))
    trained = {step: first.at(step) for step in (1, 2, 3, 4)}
    trained |= {step: second.at(step - 4) for step in (5, 6, 7, 8)}
    trained |= {step: third.at(step - 8) for step in (9, 10, 12)}
    gone_on = {4: first.at(40), 8: first.at(4)}
    begins = {4: {"jump": JUMP}, 8: {"undone": True}}
    observer = Observer(folder, str(base), {}, {}, KINDS[kind])
    observer.start(RankSource(first.at(0)))
    observer.open(0)
    for step, now in trained.items():
        if step != 7:
            observer.observe(step, RankSource(now))
        if step in begins:
            observer.begin_window(step, RankSource(gone_on[step]), **begins[step])
    observer.save()
    return observer, trained, gone_on


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("run") / "base")


@pytest.fixture(scope="module", params=list(EXACT))
def any_kind(request, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "trajectory"
    return folder, *run(folder, base, request.param)[1:], EXACT[request.param]


@pytest.fixture(scope="module")
def jumped(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jumped") / "trajectory"
    run(folder, base, "bf16")
    return folder


def test_info_shows_the_windows(jumped):
    found = json_of("info", jumped)
    assert found["steps"] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 12]
    shown = [(w["window"], w["origin_step"], w["steps"], w["jump"], w["undone"]) for w in found["windows"]]
    assert shown == [
        (0, 0, [1, 2, 3, 4], None, False), (1, 4, [5, 6, 8], JUMP, False), (2, 8, [9, 10, 12], None, True)
    ]  # fmt: skip
    assert found["figures_of_window"] == 2
    assert json_of("info", jumped, "--window", 0)["figures"] != found["figures"]
    said = call("info", jumped).stdout
    for text in (
        "jump: anchored-step_40, rank 2, from step 1 on, optimizer begun anew",
        "the weights before a jump, undone",
        "the base model",
        "5-6, 8",
        "in window 2",
    ):
        assert text in said


def test_a_trajectory_of_one_window_is_shown_as_before(base, tmp_path):
    observer = Observer(tmp_path / "trajectory", str(base), {}, {}, KINDS["bf16"])
    model = DriftingModel(weights(base))
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    observer.observe(1, RankSource(model.at(1)))
    assert "window" not in call("info", tmp_path / "trajectory").stdout
    observer.observe(2, RankSource(model.at(2)))
    observer.begin_window(2, RankSource(model.at(2)))
    found = json_of("info", tmp_path / "trajectory")  # of the last that has rows
    assert (found["figures_of_window"], [w["steps"] for w in found["windows"]]) == (0, [[1, 2], []])
    assert "the weights as trained" in call("info", tmp_path / "trajectory").stdout
    says = "holds no step up to 2 in window 1, which begins at 2; it holds none"
    assert says in refused("extrapolate", tmp_path / "trajectory", "--t-cut", 2, "--target", 4, "--out", tmp_path / "e")
    earlier = ("--t-cut", 2, "--target", 4, "--window", 0, "--out", tmp_path / "e")
    assert call("extrapolate", tmp_path / "trajectory", *earlier).exit_code == 0


def test_every_observed_step_of_every_window_comes_back(any_kind, tmp_path):
    folder, trained, gone_on, bound = any_kind
    for more, by_step in (((), trained), (("--after-jump",), gone_on)):
        for step, wanted in by_step.items():
            if step == 7:
                continue
            out = tmp_path / f"{step}{len(more)}"
            said = json_of("checkout", folder, "--step", step, "--out", out, *more)
            assert said["max_error"] <= (0 if more else bound)
            facts = json.loads((out / "relex.json").read_text())
            assert facts.get("after_jump") is (True if more else None)
            for name, tensor in weights(out).items():
                exact = wanted[name].to(tensor.dtype)
                assert (tensor.float() - exact.float()).abs().max() <= said["max_error"] * 1.01


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("checkout T --step 7 --out OUT", "step 7 was not observed; T holds 1-6, 8-10, 12"),
        ("checkout T --step 5 --after-jump --out OUT", "has no jump at step 5, nor one undone; there: 4, 8"),
        ("extrapolate T --t-cut 4 --target 9 --out OUT", "no step up to 4 in window 2, which begins at 8; it holds [9"),
        ("extrapolate T --t-cut 4 --target 9 --window 3 --out OUT", "has 3 windows, numbered from 0"),
        ("reconstruct T --step 4 --out OUT", "--step 4 is not among the 3 observed steps 9 to 12 of window 2"),
        ("info T --window 9", "there is no window 9"),
        ("compare T --t-cut 12 --out OUT", "no such step after --t-cut 12, only 9-10, 12"),
        ("baseline weight-extrapolation T --t-cut 4 --target 9 --out OUT", "no step up to 4 in window 2"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(jumped, tmp_path, arguments, says):
    places = {"T": jumped, "OUT": tmp_path / "out"}
    said = refused(*(places.get(one, one) for one in arguments.split()))
    assert says.replace("T holds", f"{jumped} holds") in said
    assert not (tmp_path / "out").exists()


def test_a_jump_from_a_step_that_was_not_observed(base, tmp_path):
    model = DriftingModel(weights(base))
    observer = Observer(tmp_path / "t", str(base), {}, {}, KINDS["sketch-2"])
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    observer.begin_window(3, RankSource(model.at(3)), JUMP)
    assert "what it jumped to there is given by --after-jump" in refused(
        "checkout", tmp_path / "t", "--step", 3, "--out", tmp_path / "c"
    )
    json_of("checkout", tmp_path / "t", "--step", 3, "--after-jump", "--out", tmp_path / "c")  # a sketch keeps origins
    assert all(torch.equal(one, model.at(3)[name]) for name, one in weights(tmp_path / "c").items())


def test_predictions_are_of_one_window(jumped, base, tmp_path):
    """The last, or the one that is named; a line through two windows would be none."""
    fit = ("--method", "two-point", "--target", 16)
    for window, cut, origin in ((1, 8, 4), (-1, 12, 8)):
        out = tmp_path / f"w{window}"
        arguments = ("extrapolate", jumped, "--t-cut", cut, "--window", window, *fit, "--out", out)
        assert len(json_of(*arguments)["predictions"]) == 1
        assert json.loads((out / "two-point-step_16/relex.json").read_text())["window"] == window % 3
        start = ("--step", origin, "--after-jump") if origin else ("--step", 0)
        json_of("checkout", jumped, *start, "--out", tmp_path / f"o{window}")
        json_of("checkout", jumped, "--step", cut, "--out", tmp_path / f"l{window}")
        origins, lasts, found = (weights(path) for path in (tmp_path / f"o{window}", tmp_path / f"l{window}",
                                                            out / "two-point-step_16"))  # fmt: skip
        scale = (16 - origin) / (cut - origin)
        for name, one in found.items():
            line = origins[name].float() + scale * (lasts[name].float() - origins[name].float())
            torch.testing.assert_close(one.float(), line, rtol=2**-7, atol=1e-6)
    grid = ("sweep", jumped, "--t-cut", 8, "--window", 1, *fit, "--out", tmp_path / "s")
    [row] = json_of(*grid)["predictions"]
    here, there = weights(tmp_path / "s" / row["path"]), weights(tmp_path / "w1/two-point-step_16")
    assert all(torch.equal(here[name], there[name]) for name in here)
    json_of("extrapolate", jumped, "--t-cut", 4, "--window", 0, *fit, "--out", tmp_path / "w0")
    assert "window" not in json.loads((tmp_path / "w0/two-point-step_16/relex.json").read_text())


def test_studies_are_of_one_window(jumped, tmp_path):
    assert json_of("diagnose", jumped)["steps"] == [9, 10, 12]
    assert json_of("diagnose", jumped, "--window", 0)["steps"] == [1, 2, 3, 4]
    assert {row["target"] for row in json_of("backtest", jumped, "--window", 1)["rows"]} == {8}
    for window, cut, later in ((0, 2, {3, 4}), (1, 6, {8}), (2, 10, {12})):
        rows = json_of("compare", jumped, "--t-cut", cut, "--window", window)["rows"]
        assert {row["step"] for row in rows if row["method"] == "relex"} == later
    of_first = ("--t-cut", 4, "--target", 9, "--window", 0, "--out", tmp_path / "b")
    [row] = json_of("baseline", "weight-extrapolation", jumped, *of_first, "--no-copy-norms")["predictions"]
    line = ("--t-cut", 4, "--target", 9, "--window", 0, "--method", "two-point", "--out", tmp_path / "t")
    json_of("extrapolate", jumped, *line)
    here, there = weights(row["path"]), weights(tmp_path / "t/two-point-step_9")
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_from_python(jumped, tmp_path):
    trajectory = Trajectory(jumped)
    assert [window.origin_step for window in trajectory.windows] == [0, 4, 8]
    assert (trajectory.number, trajectory.steps, trajectory.of_window(0).steps) == (2, [9, 10, 12], [1, 2, 3, 4])
    assert diagnose(trajectory).steps == diagnose(jumped).steps == [9, 10, 12]
    assert diagnose(trajectory.of_window(1)).steps == diagnose(trajectory, window=1).steps == [5, 6, 8]
    folder = extrapolate(jumped, 20, 4, out=tmp_path, window=0)
    assert json.loads((folder / "relex.json").read_text())["observed_steps"] == [1, 2, 3, 4]
    assert reconstruct(jumped, 6, out=tmp_path / "r", window=1) == tmp_path / "r"
    assert json.loads((tmp_path / "r/relex.json").read_text())["window"] == 1
    with pytest.raises(ValueError, match="holds another prediction"):
        extrapolate(jumped, 20, 8, out=tmp_path, window=1)
    with pytest.raises(TrajectoryError, match="there is no window 3"):
        extrapolate(trajectory, 20, out=tmp_path, window=3)
