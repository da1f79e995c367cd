"""What a cut leaves behind for people: report, pictures, page, W&B. None of the showing may cost the decision."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from relex_verl.reporting import wandb
from relex_verl.reporting.figures import horizon_figure
from relex_verl.reporting.findings import CutReport, Findings, Predicted
from relex_verl.reporting.page import write_html
from relex_verl.reporting.provenance import Provenance, versions
from relex_verl.reporting.timeline import timeline_figure
from relex_verl.run.cut import Verdict
from relex_verl.run.output import OutputFolder
from relex_verl.run.schedule import Schedule

__all__ = ["attempt", "ended", "report", "show", "spent"]

logger = logging.getLogger("relex_verl")


def attempt(what: str, work: Callable[[], Any]) -> Any:
    """Run what the decision does not depend on; an error costs no more than that, and is told with its traceback."""
    try:
        return work()
    except Exception:
        logger.warning("RELEX: %s failed; the decision stands", what, exc_info=True)
        return None


def ended(schedule: Schedule) -> None:
    """The training is over before the coming cut was."""
    assert schedule.plan is not None
    t_cut = schedule.plan.t_cut
    if schedule.earlier:
        logger.info(
            "RELEX: training ended before another cut at step %d. %s", t_cut, schedule.earlier[-1].advice.reason
        )
    else:
        logger.warning("RELEX: training ended before the cut at step %d was scored; the trajectory is kept", t_cut)


def report(
    t_cut: int,
    findings: Findings,
    verdict: Verdict,
    output: OutputFolder,
    written: Mapping[Path, Provenance],
    metrics: Mapping[str, float],
    schedule: Schedule,
) -> CutReport:
    """All that there is to say of a cut.

    Args:
        t_cut: the last observed step.
        findings: of rank 0 in the window.
        verdict: what came of the scoring.
        output: where it goes.
        written: folder of each predicted checkpoint -> its provenance.
        metrics: of the step.
        schedule: the cuts before, and the steps that need not be trained if a prediction has won.
    """
    won, following = verdict.advice.action == "stop", schedule.after(verdict.advice)
    rows = verdict.rows(t_cut)
    scoring, since = schedule.scoring(rows), schedule.earlier[-1].t_cut if schedule.earlier else 0
    return CutReport(
        t_cut=t_cut,
        observed_steps=findings.steps,
        advice=verdict.advice,
        recommended_path=str(output.path / "recommended") if won else None,
        validation_scores=rows,
        screened_out=verdict.screened_out,
        predictions=[Predicted.at(folder, provenance) for folder, provenance in written.items()],
        backtests=findings.backtests,
        fits=findings.fits,
        versions=versions(),
        metrics=dict(metrics),
        earlier_cuts=list(schedule.earlier),
        steps_saved=schedule.saved - ceil(scoring.steps or 0) if won and schedule.saved else 0,
        next_cut=None if following is None else following.t_cut,
        single_steps=schedule.kind.keeps_rows,
        origin_step=findings.origin_step,
        scoring=scoring if scoring.validations else None,
        rewards={str(step): value for step, value in verdict.rewards.items() if step >= since} or None,
    )


def spent(report: CutReport) -> dict[str, float]:
    """`relex/scoring/...`: what this cut's scores and those before took in all; and what is saved by stopping here."""
    flat = {"relex/steps_saved": float(report.steps_saved)} if report.recommended_path is not None else {}
    known = {} if report.scoring is None else vars(report.scoring)
    return flat | {f"relex/scoring/{what}": float(value) for what, value in known.items() if value is not None}


def show(
    output: OutputFolder, loggers: Mapping[str, Any], report: CutReport, drawn: Mapping[str, Path], verdict: Verdict
) -> None:
    """Tell the console, draw the scores, write the page and the scores of each prompt, and log to W&B if verl does.

    Args:
        output: where it goes.
        loggers: verl's, by name.
        report: of the cut.
        drawn: pictures of the window, name -> PNG file.
        verdict: what came of the scoring.
    """
    t_cut = report.t_cut
    logger.info("RELEX: %s Report: %s", verdict.advice.reason, output.path / "report.html")
    attempt("keeping the scores", lambda: output.keep_scores(t_cut, verdict.validations(t_cut)))
    figures = dict(drawn)
    if report.validation_scores:
        picture = attempt(
            "drawing the scores", lambda: horizon_figure(output.path / "figures", report.validation_scores)
        )
        figures |= {} if picture is None else {"scores": picture}
    story = attempt("drawing the cuts so far", lambda: timeline_figure(output.path / "figures", report))
    figures |= {} if story is None else {"timeline": story}
    for folder in (output.cut(t_cut), output.path):
        attempt("writing report.html", partial(write_html, folder / "report.html", report, figures))
    if "wandb" in loggers:
        attempt("logging to W&B", lambda: wandb.log_cut(loggers["wandb"], report, figures))
