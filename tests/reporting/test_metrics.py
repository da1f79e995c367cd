"""Values for people: flat metrics, a strict report, and what W&B is given (by a mock here; its own files: integration)."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from cut_reports import cut_report, predicted, scored
from wandb_mock import WandbMock

from relex_verl.maths.advice import Advice
from relex_verl.maths.diagnostics import describe, half_backtest
from relex_verl.maths.extrapolators import Prediction
from relex_verl.maths.gram import delta_gram
from relex_verl.maths.window import Window
from relex_verl.reporting import metrics
from relex_verl.reporting import wandb as reporting_wandb
from relex_verl.reporting.findings import CutReport, Fits, Scored
from relex_verl.reporting.provenance import Provenance
from relex_verl.reporting.wandb import log_cut

STEPS = [1, 2, 3, 4, 5, 6]


def window_of(tensors: int = 3, rows: int = len(STEPS)) -> Window:
    """Trajectories of tensors, the last of which never moved."""
    generator = torch.Generator().manual_seed(0)
    increments = torch.randn(tensors, 1, 50, generator=generator, dtype=torch.float64)
    increments = increments + 0.3 * torch.randn(tensors, len(STEPS), 50, generator=generator, dtype=torch.float64)
    increments[-1] = 0.0
    gram_LTT = delta_gram(increments @ increments.transpose(1, 2))[:, :rows, :rows]
    return Window(["a", "b", "c"][:tensors], STEPS[:rows], gram_LTT)


def test_metrics_of_a_step() -> None:
    figures = describe(window_of())
    flat = metrics.step_metrics(figures, 0.02, 1000, backtest=0.6)
    assert flat["relex/ready"] == 1.0
    assert flat["relex/backtest/error_vs_hold"] == 0.6
    assert flat["relex/drift"] == pytest.approx(figures["drift"][:-1].mean().item())
    for figure in ("explained_variance", "line_r2", "drift"):
        assert flat[f"relex/{figure}/min"] <= flat[f"relex/{figure}/p10"] <= flat[f"relex/{figure}/mean"]
    assert all(isinstance(value, float) and math.isfinite(value) for value in flat.values())
    assert metrics.step_metrics(figures, 0.02, 1000, backtest=1.0)["relex/ready"] == 0.0


def test_nothing_is_said_of_what_is_not_defined_yet() -> None:
    flat = metrics.step_metrics(describe(window_of(rows=1)), 0.02, 1000, math.nan)
    assert not any("ready" in name or "backtest" in name or "drift" in name for name in flat)


def test_a_backtest_needs_enough_rows() -> None:
    assert math.isnan(half_backtest(window_of(rows=1), "relex"))
    assert half_backtest(window_of(), "relex") < 1.0


def test_fits_of_a_cut() -> None:
    fits = metrics.fit_report(window_of(), [[5, 10], [50], [2, 25]], 1)
    assert [row["tensor"] for row in fits.tensors] == ["a", "b", "c"]
    assert fits.tensors[0]["explained_variance"] > 0.5
    assert fits.tensors[2]["explained_variance"] is None
    assert fits.tensors[2]["delta_norm"] == 0.0
    assert fits.random_walk_null["explained_variance"] > 0.8


def test_a_trajectory_that_never_moved_makes_a_strict_report() -> None:
    window = Window(["a"], STEPS, torch.zeros(1, 6, 6, dtype=torch.float64))
    backtests = {"relex": half_backtest(window, "relex")}
    report = cut_report(6, fits=metrics.fit_report(window, [[50]], 1), backtests=backtests)
    assert math.isnan(backtests["relex"])
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["backtests"] == {"relex": None}


def report_of(action: str, predictions: list[Path], target: str | None = None) -> CutReport:
    return cut_report(
        30,
        fits=Fits({}, {}, [{"tensor": name, "shape": [2, 3], "line_r2": None} for name in ("a", "b")]),
        validation_scores=[scored("observed-step_30", 30, 0.5, None), scored("relex-step_60", 60, 0.5)],
        screened_out={"poly": "it misses by 3.00 times"},
        advice=Advice(
            action, None if target is None else Prediction("relex", int(target.split("_")[1])), "Stop: it won"
        ),
        recommended_path="/out/recommended" if target else None,
        steps_saved=170 if target else 0,
        predictions=[
            predicted(folder, 30, Prediction("relex", int(folder.name.split("_")[1]))) for folder in predictions
        ],
    )


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    both = [tmp_path / "relex-step_60", tmp_path / "relex-step_100"]
    for folder in both:
        folder.mkdir()
        facts = Provenance.of(
            Prediction("relex", int(folder.name.split("_")[1])), "base", 30, STEPS, Path("/trajectory")
        )
        (folder / "relex.json").write_text(json.dumps(facts.to_json()))
        (folder / "model.safetensors").write_bytes(bytes(100))
    return both


def test_wandb_gets_it_all(folders: list[Path]) -> None:
    wandb = WandbMock()
    figures = {name: Path(f"{name}.png") for name in ("coefficients", "spectrum", "r2_by_layer", "backtest", "scores")}
    log_cut(wandb, report_of("stop", folders, "relex-step_60"), figures)
    ((logged, step),) = wandb.logged
    assert step == 30
    assert logged["relex/tensors"].data == [["a", "[2, 3]", None], ["b", "[2, 3]", None]]
    assert logged["relex/candidates"].columns == [of.name for of in fields(Scored) if of.name != "metrics"]
    assert [row[0] for row in logged["relex/candidates"].data] == ["observed-step_30", "relex-step_60"]
    assert logged["relex/screened_out"].data == [["poly", "it misses by 3.00 times"]]
    assert {name for name in logged if "figures" in name} == {f"relex/figures/{name}" for name in figures}
    assert wandb.run.summary == {
        "relex/advice": "stop",
        "relex/recommended_path": "/out/recommended",
        "relex/steps_saved": 170,
    }
    assert wandb.alerts == [("RELEX: stop", "Stop: it won")]
    artifact, aliases = wandb.artifacts["relex-step_60-r1"]
    assert (artifact.type, artifact.metadata["method"]) == ("model", "relex")
    assert artifact.added == [("dir", str(folders[0]))]
    assert aliases == ["latest", "recommended"]
    assert wandb.artifacts["relex-step_100-r1"][1] == ["latest"]


def test_wandb_gets_large_checkpoints_by_reference(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied, and nothing read: the training waits meanwhile."""
    monkeypatch.setattr(reporting_wandb, "UPLOAD_LIMIT", 100)
    wandb = WandbMock()
    log_cut(wandb, report_of("stop", folders, "relex-step_60"), {})
    assert wandb.artifacts["relex-step_60-r1"][0].added == [("reference", folders[0].as_uri(), False)]


def test_wandb_of_a_cut_without_scores(folders: list[Path]) -> None:
    wandb = WandbMock()
    log_cut(wandb, replace(report_of("unscored", folders), validation_scores=[], screened_out={}), {})
    assert wandb.logged[0][0].keys() == {"relex/tensors"}
    assert wandb.run.summary == {"relex/advice": "unscored"}
    assert all("recommended" not in aliases for _, aliases in wandb.artifacts.values())


def test_a_real_artifact_takes_a_reference_without_reading_it(folders: list[Path]) -> None:
    """W&B's own class: a digest of the path, whatever the file holds."""
    wandb = pytest.importorskip("wandb")
    digests = []
    for content in (b"one", b"two"):
        (folders[0] / "model.safetensors").write_bytes(content)
        artifact = wandb.Artifact("relex", type="model")
        artifact.add_reference(folders[0].as_uri(), checksum=False)
        digests.append(artifact.manifest.entries["model.safetensors"].digest)
    assert digests[0] == digests[1]
