"""What the page says of cuts: the scores of the last one, those before it, and what they took. HTML out."""

from collections.abc import Mapping, Sequence
from html import escape

from relex_verl.reporting.findings import CutReport, EarlierCut, Scored
from relex_verl.reporting.tables import Cell, cell, count, duration, table
from relex_verl.reporting.timeline import timeline_rows

__all__ = ["WORDS", "cuts_so_far", "earlier", "scores", "screened", "spent"]

WORDS = {
    "stop": ("■", "Stop"),
    "keep_training": ("▶", "Keep training"),
    "unscored": ("?", "Unscored"),
    "jump": ("»", "Jumped"),
    "undo": ("«", "Undone"),
}


def spent(report: CutReport) -> str:
    """How much was generated to score this cut, and all cuts so far."""
    if not report.validation_scores:
        return "nothing was scored"
    said = f"{count(len(report.validation_scores), 'validation')}, the last observed weights among them"
    if report.scoring is None:
        return said
    steps = report.scoring.steps
    said += f"; in the run so far {count(report.scoring.samples, 'sample')} in {duration(report.scoring.seconds)}"
    return said if steps is None else f"{said}, as many as {steps:.3g} training steps generate"


def cuts_so_far(report: CutReport) -> str:
    """The windows of the run, one a cut."""
    columns = {"Steps": True, "What": False, "To step": True, "Observed": True, "Prediction": True, "p": True}
    columns |= {"Validations": True, "Samples": True}
    rows = []
    for row in timeline_rows(report):
        mark, word = WORDS.get(row["action"], ("•", row["action"].replace("_", " ")))
        what = [cell(f"{row['window from'] + 1} to {row['step']}"), Cell(f"{mark} {word}"), cell(row["target"])]
        scores = [cell(row["observed"], 3), cell(row["prediction"], 3), cell(row["p_value"], 3)]
        rows.append([*what, *scores, cell(row["validations"]), cell(row["samples"])])
    if not rows:
        return ""
    said = (
        "<h2>The run so far</h2><p>What each cut found in its window: scores on all prompts, and the p-value of the test "
        "that decided (of a run that jumps, of harm). Of an undone jump, Prediction is what the weights that are back had "
        "scored.</p>"
    )
    return said + table("The run so far", columns, rows)


def scores(report: CutReport) -> str:
    """Table of what was scored at the last cut."""
    if not report.validation_scores:
        return ""
    metric = escape(report.validation_scores[0].metric)
    return (
        f"<h2>Scores</h2><p>All prompts of the validation set, by <code>{metric}</code>. The decision rests on the prompts "
        "that the search had not seen, so its two scores differ a little from these.</p>"
        + _score_table(
            report.validation_scores, None if report.advice.target is None else report.advice.target.folder_name
        )
    )


def _score_table(scored: Sequence[Scored], winner: str | None) -> str:
    columns = {"Weights": False, "Step": True, "Score": True, "95% interval": True}
    columns |= {"In the search": True, "Prompts": True, "Seconds": True}
    rows = []
    ordered = sorted(scored, key=lambda row: row.target)
    for row in ordered:
        half = 1.96 * row.standard_error
        name = Cell(row.name, "<em>recommended</em>" if row.name == winner else "")
        interval = cell(f"{row.score - half:.3f} to {row.score + half:.3f}")
        numbers = (cell(row.search_score, 3), cell(row.prompts), cell(row.seconds, 1))
        rows.append([name, cell(row.target), cell(row.score, 3), interval, *numbers])
    winners = [i for i, row in enumerate(ordered) if row.name == winner]
    return table("Scores", columns, rows, highlighted=winners)


def screened(reasons: Mapping[str, str]) -> str:
    """Methods that were left out, with the reasons."""
    if not reasons:
        return ""
    rows = [[cell(method), Cell(reason, words=True)] for method, reason in reasons.items()]
    said = "<h2>Screened out</h2><p>Methods that were not worth a validation.</p>"
    return said + table("Screened out", {"Method": False, "Left out because": False}, rows)


def earlier(cuts: Sequence[EarlierCut]) -> str:
    """The cuts before, folded, the latest first."""
    folded = [
        f"<details><summary>Step {cut.t_cut}: {escape(WORDS.get(cut.advice.action, ('', cut.advice.action))[1].lower())}"
        f"</summary><p>{escape(cut.advice.reason)}</p>"
        + (_score_table(cut.validation_scores, None) if cut.validation_scores else "")
        + "</details>"
        for cut in reversed(cuts)
    ]
    return "<h2>Earlier cuts</h2>" + "\n".join(folded) if folded else ""
