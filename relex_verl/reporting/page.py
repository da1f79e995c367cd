"""What a cut leaves behind for people: one HTML page that needs no network, opening with the answer.

Whatever comes from a report (names of tensors, reasons, paths) is escaped, and the page forbids itself to load anything.
"""

import base64
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from math import prod
from pathlib import Path

from relex_verl.reporting.findings import CutReport
from relex_verl.reporting.next_steps import next_steps
from relex_verl.reporting.page_cuts import WORDS, cuts_so_far, earlier, scores, screened, spent
from relex_verl.reporting.tables import Cell, cell, count, duration, table
from relex_verl.reporting.writing import temporary_for

__all__ = ["write_html"]

MEANING = {
    "stop": "A predicted checkpoint has beaten the last observed weights, on prompts that the search had not seen.",
    "keep_training": "No prediction has beaten the weights that you already have.",
    "jump": "The weights were set to a prediction that won the search, and training goes on from there.",
    "undo": "What was trained from the last jump had fallen behind the weights before it, which are back.",
    "unscored": "Nothing was compared, so nothing is recommended, however straight the lines below are.",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# Name of a picture -> its title, how to read it, and what stands in it for those who do not see it.
PICTURES = {
    "scores": (
        "How the predictions scored",
        "Each point is a predicted checkpoint with its 95% interval, the grey band is the last observed one. "
        "The decision is a paired test on the same prompts, which sees more than whether intervals overlap.",
        "Scores with intervals against the predicted step, beside the score of the last observed weights.",
    ),
    "timeline": (
        "The run so far, with its cuts",
        "Left: what the weights scored at each cut, and what was jumped to or taken back, over the mean reward of the "
        "training samples. Right: the search at each cut, above what the observed weights scored there.",
        "Scores at each cut with the jumps marked, over the reward curve; and the score curve of each cut.",
    ),
    "coefficients": (
        "How far along its direction each tensor has moved",
        "Dots are what was observed, the line is what a prediction follows. Where the dots bend away from it, it will "
        "miss.",
        "Rank-1 coefficient against the training step, with its line, for the tensors that moved most.",
    ),
    "r2_by_layer": (
        "How straight each tensor moves (R² of its line, by layer)",
        "1 is a perfect line. Only what is clearly above the random walk in the title says anything.",
        "Heat map of R² by layer and module.",
    ),
    "spectrum": (
        "How much of the movement is one direction, beside a random walk",
        "The first point is the share of the first direction. A random walk has a large one as well: what counts is the "
        "distance between the two.",
        "Share of the variance of each component, of the run and of a random walk.",
    ),
    "backtest": (
        "Would it have predicted what came? (backtest)",
        "Below the dashed line the prediction was nearer to what came than the checkpoint it was made from. Further to the "
        "right is a longer horizon.",
        "Error of predicting the last observed step from earlier ones, relative to holding, against the horizon.",
    ),
}
MEASURES = {
    "explained_variance": ("Share in one direction", "of the movement; 1 is all of it"),
    "line_r2": ("R² of the line", "1 is perfectly straight and even"),
    "spectral_gap": ("Spectral gap", "how far the first direction is ahead of the second"),
    "drift": ("Turn of the direction", "between the first half of the steps and all; 0 is none"),
}
TENSOR_COLUMNS = {"tensor": "Tensor", "shape": "Shape", "delta_norm": "Distance moved"}


def write_html(path: Path, report: CutReport, figures: Mapping[str, Path]) -> None:
    """One page: the answer, what to do next, scores, figures (inside it) and tensors.

    Args:
        path: of the page. It is there whole, or as it was before.
        report: of the cut. Whatever its texts say, the page shows them as text.
        figures: name -> PNG file; "scores" stands beside the answer.
    """
    below = {name: figure for name, figure in figures.items() if name not in ("scores", "timeline")}
    parts = [
        _answer(report),
        _picture("scores", figures["scores"]) if "scores" in figures else "",
        _next_steps(report),
        cuts_so_far(report),
        _picture("timeline", figures["timeline"]) if "timeline" in figures else "",
        scores(report),
        screened(report.screened_out),
        *(["<h2>How it moved</h2>"] if below or report.fits.summary else []),
        _measures(report),
        *(_picture(name, figure) for name, figure in below.items()),
        earlier(report.earlier_cuts),
        _tensors(report),
        f"<footer>{escape(', '.join(f'{name} {version}' for name, version in report.versions.items()))}</footer>",
    ]
    word = escape(WORDS.get(report.advice.action, ("", report.advice.action))[1])
    page = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{word} · RELEX at step {report.t_cut}</title>\n<style>\n{_asset('page.css')}</style>\n"
        "<main>\n" + "\n".join(part for part in parts if part) + "\n</main>\n"
        f"<script>\n{_asset('page.js')}</script>\n</html>\n"
    )
    with temporary_for(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # a path may hold any bytes


def _asset(name: str) -> str:
    return files("relex_verl.reporting").joinpath(name).read_text(encoding="utf-8")


def _answer(report: CutReport) -> str:
    advice, steps = report.advice, report.observed_steps
    mark, word = WORDS.get(advice.action, ("•", advice.action.replace("_", " ")))
    reason = advice.reason.removeprefix(f"{word}: ").rstrip(".")
    seen = count(len(steps), "observed step") + (f" ({steps[0]} to {steps[-1]})" if len(steps) > 1 else "")
    where = "" if report.recommended_path is None else f"<p>It is in <code>{escape(report.recommended_path)}</code></p>"
    return (
        f'<section class="answer {escape(advice.action)}"><p class="where">RELEX, cut at step {report.t_cut}, {seen}</p>'
        f'<h1><span aria-hidden="true">{mark}</span>{escape(word)}</h1><p class="reason">{escape(reason)}.</p>'
        f"<p>{MEANING.get(advice.action, '')}</p>{where}</section>" + _facts(report)
    )


def _facts(report: CutReport) -> str:
    """What the decision rests on, and what it costs to go on."""
    advice, scored = report.advice, report.validation_scores
    facts = []
    if advice.score is not None and advice.hold_score is not None:
        against = f"against {advice.hold_score:.3f} of step {report.t_cut}, on {count(advice.prompts, 'prompt')}"
        if advice.p_value is not None and advice.alpha is not None:
            against += f"; p = {advice.p_value:.2g}, below {advice.alpha:.2g} needed"
        facts.append(("Score of the best prediction", f"{advice.score:.3f}", against))
    if advice.action == "stop":
        rest = "up to the end of the run, less those that generate as many samples as the scoring did"
        if report.steps_saved <= 0:
            rest = (
                "the run is at its end" if report.steps_saved == 0 else "the scoring took more than the rest of the run"
            )
        facts.append(("Stopping here saves", count(report.steps_saved, "training step"), rest))
    if report.next_cut is not None:
        away = count(report.next_cut - report.t_cut, "training step")
        further = f"{away} from here, if its rows fit; it is tested again there"
        facts.append(("Next cut", f"step {report.next_cut}", further))
    elif advice.action == "keep_training":
        facts.append(("Next cut", "none", "the run ends before another one"))
    facts.append(("Time spent on scoring", duration(sum(row.seconds for row in scored)), spent(report)))
    rows = (
        f"<div><dt>{label}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for label, value, more in facts
    )
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _next_steps(report: CutReport) -> str:
    steps = [
        f'<section class="next"><header><h3>{escape(step.title)}</h3></header><p>{escape(step.note)}</p>'
        f'<pre tabindex="0">{escape(step.text)}</pre></section>'
        for step in next_steps(report)
    ]
    return "<h2>What to do next</h2>" + "\n".join(steps) if steps else ""


def _measures(report: CutReport) -> str:
    fits = report.fits
    rows = [
        [
            Cell(label, f'<br><span class="soft">{note}</span>', words=True),
            *(cell(values.get(key), 4) for key in ("mean", "p10", "min")),
            cell(fits.random_walk_null.get(name), 4),
        ]
        for name, (label, note) in MEASURES.items()
        if (values := fits.summary.get(name))
    ]
    said = [
        f"Predicting the last observed step from the first half of the steps, {escape(method)} has {error:.2f} of the "
        "error of holding still (below 1 is nearer)."
        for method, error in report.backtests.items()
        if error == error
    ]
    if not rows:
        return "".join(f"<p>{sentence}</p>" for sentence in said)
    columns = {"Over all tensors": False, "Mean": True, "10th percentile": True, "Least": True, "Random walk": True}
    note = (
        "<p>A path without any direction, a random walk, looks straight as well: read each figure beside its own.</p>"
    )
    return (
        note
        + table("How straight the tensors move", columns, rows)
        + "".join(f"<p>{sentence}</p>" for sentence in said)
    )


def _picture(name: str, path: Path) -> str:
    title, how, alt = PICTURES.get(name, (name.replace("_", " ").capitalize(), "", name.replace("_", " ")))
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><h3>{escape(title)}</h3><figcaption>{escape(how)}</figcaption><div class="card {escape(name)}">'
        f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div></figure>'
    )


def _tensors(report: CutReport) -> str:
    rows = report.fits.tensors
    if not rows:
        return ""
    labels = TENSOR_COLUMNS | {name: label for name, (label, _) in MEASURES.items()}
    columns = {key: labels.get(key, key.replace("_", " ")) for key in rows[0]}
    cells = [
        [
            Cell(" x ".join(map(str, value)), value=prod(value))
            if isinstance(value, list)
            else cell(value, 4 if key in MEASURES else None)
            for key, value in ((key, row.get(key)) for key in columns)
        ]
        for row in rows
    ]
    shown = table("Tensors", {label: key != "tensor" for key, label in columns.items()}, cells, sortable=True)
    folded = f"<details><summary>{count(len(rows), 'tensor')}<small>what moved, how far, how straight</small></summary>"
    return f"<h2>Tensor by tensor</h2>{folded}{shown}</details>"
