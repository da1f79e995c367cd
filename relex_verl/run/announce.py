"""What a cut leaves behind for people: report, pictures, page, W&B. None of the showing may cost the decision."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from relex_verl.reporting import wandb
from relex_verl.reporting.provenance import Provenance, versions
from relex_verl.reporting.report import horizon_figure, write_html
from relex_verl.run.cut import Verdict
from relex_verl.run.output import OutputFolder

__all__ = ["attempt", "report", "show"]

logger = logging.getLogger("relex_verl")


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """Run what the decision does not depend on; an error costs no more than that, and is told with its traceback."""
    try:
        return work()
    except Exception:
        logger.warning("RELEX: %s failed; the decision stands", what, exc_info=True)
        return None


def report(
    t_cut: int,
    window: Mapping[str, Any],
    verdict: Verdict,
    output: OutputFolder,
    written: Mapping[Path, Provenance],
) -> dict[str, Any]:
    """What report.json says of a cut by itself.

    Args:
        t_cut: the last observed step.
        window: the fits, as rank 0 gave them.
        verdict: what came of the scoring.
        output: where it goes.
        written: folder of each predicted checkpoint -> its provenance.
    """
    return {
        "t_cut": t_cut,
        "observed_steps": window["steps"],
        "advice": asdict(verdict.advice),
        "recommended_path": None if verdict.winner is None else str(output.path / "recommended"),
        "validation_scores": verdict.rows(t_cut),
        "screened_out": verdict.screened_out,
        "predictions": [{"path": str(folder), **provenance.to_json()} for folder, provenance in written.items()],
        "backtests": window["backtests"],
        "fits": window["fits"],
        "versions": versions(),
    }


def show(
    output: OutputFolder,
    loggers: Mapping[str, Any],
    t_cut: int,
    found: Mapping[str, Any],
    drawn: Mapping[str, Path],
    verdict: Verdict,
) -> None:
    """Tell the console, draw the scores, write the page and the scores of each prompt, and log to W&B if verl does.

    Args:
        output: where it goes.
        loggers: verl's, by name.
        t_cut: the last observed step.
        found: the whole report.
        drawn: pictures of the window, name -> PNG file.
        verdict: what came of the scoring.
    """
    logger.info("RELEX: %s Report: %s", verdict.advice.reason, output.path / "report.html")
    attempt("keeping the scores", lambda: output.keep_scores(t_cut, verdict.validations(t_cut)))
    figures = dict(drawn)
    if found["validation_scores"]:
        picture = attempt(
            "drawing the scores", lambda: horizon_figure(output.path / "figures", found["validation_scores"])
        )
        figures |= {} if picture is None else {"scores": picture}
    for folder in (output.cut(t_cut), output.path):
        attempt("writing report.html", partial(write_html, folder / "report.html", found, figures))
    if "wandb" in loggers:
        folders = [Path(prediction["path"]) for prediction in found["predictions"]]
        attempt("logging to W&B", lambda: wandb.log_cut(loggers["wandb"], t_cut, found, figures, folders))
