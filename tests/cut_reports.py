"""Findings and reports of a cut as tests need them: whole, with what matters given."""

from pathlib import Path
from typing import Any

from relex_verl.maths.advice import Advice, unscored
from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import CutReport, EarlierCut, Findings, Fits, Predicted, Scored
from relex_verl.reporting.provenance import Provenance

NO_FITS = Fits(summary={}, random_walk_null={}, tensors=[])
FOUND = Findings([1, 2, 3, 4], 0, NO_FITS, {"relex": 0.5}, drift=0.0, agreement=1.0, figures={})


def advised(action: str, target: Prediction | None = None) -> Advice:
    """Advice whose reason is its action."""
    return Advice(action, target, f"{action}.")


def scored(
    name: str, target: int, score: float, method: str | None = "relex", standard_error: float = 0.02, **more: Any
) -> Scored:
    """A row of the scores; of the observed weights where there is no method."""
    given = {"metric": "acc", "search_score": None, "prompts": 400, "seconds": 3.0, "metrics": {"val-aux/x": 1.0}}
    return Scored(name, method, target, score=score, standard_error=standard_error, **{**given, **more})


def predicted(folder: Path, t_cut: int, prediction: Prediction) -> Predicted:
    """A checkpoint that was written."""
    return Predicted.at(folder, Provenance.of(prediction, "base", t_cut, [t_cut], folder.parent / "trajectory"))


def earlier_cut(t_cut: int, action: str = "keep_training") -> EarlierCut:
    """A cut that came to a verdict."""
    return EarlierCut(t_cut, advised(action), [], {})


def cut_report(t_cut: int, **more: Any) -> CutReport:
    """The report of a cut at which nothing was scored, but for what is given."""
    nothing: dict[str, Any] = {
        "observed_steps": [t_cut],
        "advice": unscored("no validation"),
        "recommended_path": None,
        "validation_scores": [],
        "screened_out": {},
        "predictions": [],
        "backtests": {},
        "fits": NO_FITS,
        "versions": {},
        "metrics": {},
        "earlier_cuts": [],
        "steps_saved": 0,
    }
    return CutReport(t_cut, **{**nothing, **more})
