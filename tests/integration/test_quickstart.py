"""README and docs as a new user meets them: the quickstart ends in a recommendation, every command runs as written."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from documentation import commands, is_run
from harness import ROOT, load, starts, training
from wandb_files import records

OUT = ROOT / "outputs" / "quickstart"


def shell(command: str) -> str:
    if "recipes/quickstart/run.sh" in command:
        starts.append(command)
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """Every command of the README and the docs, the README's first, in an empty outputs folder."""
    shutil.rmtree(OUT, ignore_errors=True)
    return {command: shell(command) for command in commands() if is_run(command)}


def report(out: Path) -> dict:
    return json.loads((out / "relex" / "report.json").read_text())


def test_the_readme_runs(said: dict[str, str]) -> None:
    first, *offline = said
    assert first.startswith("bash recipes/quickstart/run.sh")
    assert {command.split()[1] for command in offline} >= {"plan", "extrapolate", "info", "checkout", "diagnose"}
    table = said[first]
    for row in ("base", "last observed", "predicted"):
        assert row in table
    assert "AutoModelForCausalLM.from_pretrained" in table


def test_the_quickstart_recommends_a_checkpoint_that_won(said: dict[str, str]) -> None:
    advice = report(OUT)["advice"]
    assert advice["action"] == "stop", advice
    assert advice["score"] > advice["hold_score"]
    assert advice["p_value"] < 0.05
    recommended = load(OUT / "relex" / "recommended")
    winner = load(OUT / "relex" / "predicted" / advice["target"])
    assert all((recommended[name] == winner[name]).all() for name in winner)
    held, *candidates = report(OUT)["validation_scores"]
    assert held["score"] == training.scores(OUT)[30]
    assert max(row["score"] for row in candidates) > held["score"]


def test_a_collapse_ends_in_keep_training(tmp_path: Path, said: dict[str, str]) -> None:
    """At 1e-5 the line leaves the model behind; the losing scores are shown."""
    extra = "-- actor_rollout_ref.actor.optim.lr=1e-5 relex.max_candidates=3"
    shell(f"bash recipes/quickstart/run.sh --out {tmp_path} {extra}")
    found = report(tmp_path)
    assert found["advice"]["action"] == "keep_training", found["advice"]
    assert found["advice"]["reason"].startswith("Keep training: relex-step_")
    held, *candidates = found["validation_scores"]
    assert len(candidates) >= 2
    assert min(row["score"] for row in candidates) < held["score"] - 0.1
    assert not (tmp_path / "relex" / "recommended").exists()


def test_wandb_holds_it_all(said: dict[str, str]) -> None:
    """Read back from W&B's own offline file, and the media files beside it."""
    written = next((OUT / "wandb").rglob("run-*.wandb"))
    history, summary, artifacts, alerts = {}, {}, [], []
    for record in records(written):
        for item in record.history.item:
            history[item.key or ".".join(item.nested_key)] = item.value_json
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = item.value_json
        if record.HasField("artifact"):
            artifacts.append(record.artifact)
        if record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact)
        if record.HasField("alert"):
            alerts.append(record.alert.text)
    found = report(OUT)
    advice = found["advice"]
    assert {"relex/explained_variance/mean", "relex/drift", "relex/ready", "timing_s/relex"} <= history.keys()
    for name in ("coefficients", "spectrum", "r2_by_layer", "backtest", "scores"):
        picture = written.parent / "files" / json.loads(history[f"relex/figures/{name}.path"])
        assert picture.read_bytes() == (OUT / "relex" / "figures" / f"{name}.png").read_bytes()
    for name, rows in (("tensors", found["fits"]["tensors"]), ("candidates", found["validation_scores"])):
        table = json.loads((written.parent / "files" / json.loads(history[f"relex/{name}.path"])).read_text())
        assert [row[0] for row in table["data"]] == [next(iter(row.values())) for row in rows]
    assert json.loads(summary["relex/advice"]) == "stop"
    assert (
        json.loads(summary["relex/recommended_path"]) == found["recommended_path"] == str(OUT / "relex" / "recommended")
    )
    assert json.loads(summary["relex/steps_saved"]) == found["steps_saved"]
    assert alerts == [advice["reason"]]
    models = {one.name.rsplit("-", 1)[0]: one for one in artifacts if one.type == "model"}
    assert models.keys() == {Path(one["path"]).name for one in found["predictions"]}
    assert [name for name, one in models.items() if "recommended" in one.aliases] == [advice["target"]]
    assert json.loads(models[advice["target"]].metadata)["method"] == "relex"
