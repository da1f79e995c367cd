"""Commands to paste after a cut: the right ones, with this run's paths, and the command line takes them."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from cut_reports import advised, cut_report, predicted, scored
from hydra.core.override_parser.overrides_parser import OverridesParser

from relex_verl.cli import app
from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import CutReport
from relex_verl.reporting.next_steps import next_steps

WINNER = Prediction("anchored", 40, rank=2, fit_from=3)


def report(folder: Path, action: str, **more: Any) -> CutReport:
    """Of a run that has predicted steps 24, 40 and 100 at step 12."""
    predictions = [WINNER, Prediction("anchored", 24, 2, 3), Prediction("anchored", 100, 2, 3)]
    places = [predicted(folder / "predicted" / one.folder_name, 12, one) for one in predictions]
    target, recommended = (WINNER, str(folder / "recommended")) if action == "stop" else (None, None)
    advice = advised(action, target)
    given = {"advice": advice, "recommended_path": recommended, "predictions": places, **more}
    rows = [scored(one.folder_name, one.target, 0.5, one.method) for one in predictions]
    return cut_report(12, **{"validation_scores": rows, **given})


def words(report: CutReport) -> dict[str, list[str]]:
    """Title -> the words that a shell makes of the text."""
    pasted = {step.title: step.text for step in next_steps(report) if "import" not in step.text}
    return {
        title: subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True
        ).stdout.splitlines()
        for title, text in pasted.items()
    }


def settings(overrides: list[str]) -> dict[str, str]:
    """Key -> value, as Hydra reads them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group: override.value() for override in parsed}


@pytest.fixture(params=["run", "my run's $HOME", "lr=1e-6,seed=[1]", "it's\\"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param / "relex"


def test_after_a_winner(folder: Path) -> None:
    won = report(folder, "stop")
    best, of_run = str(folder / "recommended"), folder / "predicted"
    found = words(won)
    found["Train on from it"] = settings(found["Train on from it"])  # type: ignore[assignment]
    assert found == {
        "Serve it": ["vllm", "serve", best],
        "Push it to the Hub": ["relex-verl", "push", best, "owner/name"],
        "Train on from it": {
            "actor_rollout_ref.model.path": best,
            "trainer.default_local_dir": str(folder.parent / "from_anchored-step_40"),
        },
        "Predict other steps": [
            *("relex-verl", "extrapolate", str(of_run / "trajectory"), "--t-cut", "12", "--target", "32,70"),
            *("--method", "anchored", "--rank", "2", "--fit-from", "3", "--out", str(of_run / "more")),
        ],
        "Look closer at the trajectory": [
            *("relex-verl", "diagnose", str(of_run / "trajectory"), "--out", str(of_run / "diagnosis"))
        ],
    }
    load = next(step.text for step in next_steps(won) if step.title == "Load it")
    compile(load, "load", "exec")
    assert repr(best) in load


def test_an_adapter_is_loaded_beside_its_base(folder: Path) -> None:
    best, nearest = folder / "recommended", folder / "predicted" / "anchored-step_24"
    for place in (best, nearest):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text("{}")
    won = report(folder, "stop")
    base, found = won.predictions[0].base_model, words(won)
    assert found["Serve it"] == ["vllm", "serve", base, "--enable-lora", "--lora-modules", f"relex={best}"]
    assert settings(found["Train on from it"])["actor_rollout_ref.model.lora_adapter_path"] == str(best)
    load = next(step.text for step in next_steps(won) if step.title == "Load it")
    compile(load, "load", "exec")
    assert f"AutoTokenizer.from_pretrained({base!r})" in load
    score = settings(words(report(folder, "keep_training"))["Score a prediction yourself"])
    assert score["actor_rollout_ref.model.lora_adapter_path"] == str(nearest)


@pytest.mark.parametrize("action", ["keep_training", "unscored"])
def test_without_a_winner_the_nearest_prediction_is_offered_for_scoring(folder: Path, action: str) -> None:
    found, of_run = words(report(folder, action)), folder / "predicted"
    titles = ["Take the weights of step 12", "Score a prediction yourself", "Predict other steps"]
    assert list(found) == [*titles, "Look closer at the trajectory"]
    checkout, score, more, _ = found.values()
    observed = str(of_run / "observed-step_12")
    assert checkout == ["relex-verl", "checkout", str(of_run / "trajectory"), "--step", "12", "--out", observed]
    overridden = settings(score)
    assert overridden["actor_rollout_ref.model.path"] == str(of_run / "anchored-step_24")
    assert overridden["trainer.val_only"] is True
    assert overridden["trainer.resume_mode"] == "disable"
    assert more[more.index("--target") + 1] == "18"


def test_a_sketch_has_no_step_to_give_back(folder: Path) -> None:
    offered = next_steps(report(folder, "keep_training", single_steps=False))
    assert offered[0].title == "Score a prediction yourself"
    assert not any("checkout" in step.text for step in offered)
    assert "your own checkpoint of that step" in offered[0].note


def test_nothing_is_offered_where_nothing_was_written(folder: Path) -> None:
    assert next_steps(report(folder, "unscored", predictions=[])) == []


def test_neighbouring_steps_leave_the_one_behind_them(folder: Path) -> None:
    near = [predicted(folder / "predicted" / "relex-step_13", 12, Prediction("relex", 13))]
    more = words(report(folder, "unscored", predictions=near, validation_scores=[]))["Predict other steps"]
    assert more[more.index("--target") + 1] == "14"


@pytest.mark.parametrize("action", ["stop", "keep_training"])
def test_the_command_line_takes_them(folder: Path, action: str) -> None:
    for made in (folder / "predicted" / "trajectory", folder / "recommended"):
        made.mkdir(parents=True)
    commands = [text for text in words(report(folder, action)).values() if text[0] == "relex-verl"]
    assert len(commands) == 3
    for _, name, *arguments in commands:
        group = typer.main.get_command(app)
        group.get_command(None, name).make_context(name, arguments)  # type: ignore[attr-defined]
