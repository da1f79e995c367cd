"""`report.html`: a cut as people read it. One file that needs no network: the answer, what to do next, pictures, tensors.

Whatever comes from a report (names of tensors, reasons, paths) is escaped, and the page forbids itself to load anything.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import isfinite
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from relex_verl.reporting.findings import CutReport, Fits, Scored
from relex_verl.reporting.records import strict

__all__ = ["write_html"]

ANSWERS = {"stop": "Stop", "keep_training": "Keep training", "unscored": "Unscored"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# Picture -> title, and how to read it; in the order of the page.
PICTURES = {
    "coefficients": (
        "How far along its direction each tensor has moved",
        "Dots are observed steps, the line is what is extrapolated. Dots that bend away from the line speak against it.",
    ),
    "r2_by_layer": (
        "How straight each tensor moves (R² of its line, by layer)",
        "1 is a straight line. A random walk shows nearly 1, too: compare with its figure in the title.",
    ),
    "spectrum": (
        "How much of the movement is one direction, beside a random walk",
        "The further the first component lies above that of the random walk, the more of the movement one direction holds.",
    ),
    "backtest": (
        "Would it have predicted what came?",
        "Each prefix of the window predicts its last step. Below 1 the prediction lies nearer to the truth than simply "
        "keeping the prefix's last checkpoint.",
    ),
}


class Step(NamedTuple):
    """Something to do next: what for, and the command that does it."""

    title: str
    command: str


def write_html(path: Path, report: CutReport, figures: Mapping[str, Path]) -> None:
    """Write the page.

    Args:
        path: of the file.
        report: of the cut.
        figures: name -> PNG file; "scores" is the curve of scores.
    """
    parts = [
        _answer(report),
        _curve(figures),
        _costs(report),
        _next_steps(report),
        _scores(report),
        _pictures(figures),
        _null(report.fits),
        _earlier(report),
        _tensors(report.fits.tensors),
        _made_by(report),
    ]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(_page(f"RELEX: {_said(report)} at step {report.t_cut}", "\n".join(filter(None, parts))))
    temporary.replace(path)


def _page(title: str, body: str) -> str:
    style, script = ((files("relex_verl.reporting") / f"page.{kind}").read_text() for kind in ("css", "js"))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{body}\n</main>\n"
        f"<script>\n{script}</script></body></html>\n"
    )


def _said(report: CutReport) -> str:
    return ANSWERS.get(report.advice.action, report.advice.action.replace("_", " "))


def _answer(report: CutReport) -> str:
    rows, steps = len(report.observed_steps), f"step {report.t_cut}"
    tone = report.advice.action if report.advice.action in ANSWERS else "unscored"
    return (
        f'<section class="answer" style="--tone: var(--{tone})"><p class="soft">RELEX, cut at {steps} of this run, '
        f"{rows} observed steps</p><h1>{html.escape(_said(report))}</h1>"
        f"<p>{html.escape(report.advice.reason)}</p></section>"
    )


def _curve(figures: Mapping[str, Path]) -> str:
    if "scores" not in figures:
        return ""
    caption = "Validation score against the predicted step, with 95 % intervals; dashed: the weights observed last."
    return _figure(figures["scores"], "Curve of validation scores", caption)


def _costs(report: CutReport) -> str:
    seconds, tests = sum(row.seconds for row in report.validation_scores), len(report.validation_scores)
    facts = {"observed up to": f"step {report.t_cut}"}
    if report.steps_saved:
        facts["going on would train"] = f"{report.steps_saved} more steps"
    if tests:
        facts["validations run"] = str(tests)
        facts["time spent scoring"] = f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
    if report.advice.p_value is not None:
        facts["paired test"] = f"p = {report.advice.p_value:.2g}, {report.advice.prompts} prompts"
    cells = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{cells}</dl>'


def _next_steps(report: CutReport) -> str:
    steps = _with_winner(report.recommended_path) if report.recommended_path else _without_winner(report)
    steps += _from_trajectory(report)
    blocks = "".join(
        f'<h3>{html.escape(step.title)}</h3><div class="command"><pre>{html.escape(step.command)}</pre></div>'
        for step in steps
    )
    return f"<h2>What to do next</h2>{blocks}" if steps else ""


def _with_winner(path: str) -> list[Step]:
    load = f"from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({path!r})"
    return [
        Step("Load the recommended checkpoint", load),
        Step("Serve it", f"vllm serve {quote(path)}"),
        Step("Push it to the Hub, with a model card", f"relex-verl push {quote(path)} owner/name"),
        Step("Train on from it: the override of a new run", f"actor_rollout_ref.model.path={quote(path)}"),
    ]


def _without_winner(report: CutReport) -> list[Step]:
    if not report.predictions:
        return []
    path, trajectory = report.predictions[0].path, report.predictions[0].trajectory
    observed = Path(trajectory).parent / f"step_{report.t_cut}"
    said = "before use" if report.advice.action == "unscored" else "on your own questions"
    checkout = f"relex-verl checkout {quote(trajectory)} --step {report.t_cut} --out {quote(str(observed))}"
    return [
        Step("Get the weights observed last: what every prediction has to beat", checkout),
        Step(f"Score a prediction {said}: serve it and run your evaluation against both", f"vllm serve {quote(path)}"),
    ]


def _from_trajectory(report: CutReport) -> list[Step]:
    if not report.predictions:
        return []
    trajectory, target = report.predictions[0].trajectory, 2 * report.t_cut
    out = quote(str(Path(trajectory).parent / "more"))
    place = quote(trajectory)
    return [
        Step(
            "Predict other steps, without a GPU",
            f"relex-verl extrapolate {place} --t-cut {report.t_cut} --target {target} --out {out}",
        ),
        Step("Look closer at the trajectory", f"relex-verl diagnose {place} --out {out}"),
    ]


def _scores(report: CutReport) -> str:
    if not report.validation_scores:
        return _screened(report.screened_out)
    target = report.advice.target
    table = _score_table(report.validation_scores, None if target is None else target.folder_name)
    return f"<h2>Scores</h2>{table}{_screened(report.screened_out)}"


def _score_table(scores: Sequence[Scored], best: str | None = None) -> str:
    shown = ("name", "score", "standard_error", "search_score", "prompts", "seconds")
    rows = [{key: getattr(row, key) for key in shown} for row in scores]
    return _table(rows, best=[row.name == best for row in scores])


def _screened(reasons: Mapping[str, str]) -> str:
    rows = [{"method": method, "left out because": reason} for method, reason in reasons.items()]
    return "<h2>Methods that were not scored</h2>" + _table(rows, said="left out because") if rows else ""


def _pictures(figures: Mapping[str, Path]) -> str:
    known = [name for name in PICTURES if name in figures]
    others = [name for name in figures if name not in PICTURES and name != "scores"]
    blocks = []
    for name in [*known, *others]:
        title, reading = PICTURES.get(name, (name.replace("_", " ").capitalize(), ""))
        blocks.append(f"<h3>{html.escape(title)}</h3>{_figure(figures[name], title, reading)}")
    return "<h2>How the weights move</h2>" + "".join(blocks) if blocks else ""


def _figure(picture: Path, alt: str, caption: str) -> str:
    content = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<figure><div class="picture"><img alt="{html.escape(alt)}" src="data:image/png;base64,{content}"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _null(fits: Fits) -> str:
    if not fits.summary:
        return ""
    rows = [
        {"over the tensors": figure.replace("_", " "), **dict.fromkeys(("mean", "p10", "min")), **statistics}
        | {"a random walk shows": fits.random_walk_null.get(figure)}
        for figure, statistics in fits.summary.items()
    ]
    said = "Explained variance and R² say little alone: directionless noise over the same steps shows the last column."
    return f"<h2>In figures</h2><p>{said}</p>{_table(rows)}"


def _earlier(report: CutReport) -> str:
    cuts = [
        f"<details><summary>Earlier cut, at step {cut.t_cut}: {html.escape(cut.advice.action.replace('_', ' '))}</summary>"
        f"<p>{html.escape(cut.advice.reason)}</p>"
        f"{_score_table(cut.validation_scores) if cut.validation_scores else ''}</details>"
        for cut in reversed(report.earlier_cuts)
    ]
    return "<h2>Earlier cuts</h2>" + "".join(cuts) if cuts else ""


def _tensors(tensors: Sequence[Mapping[str, Any]]) -> str:
    if not tensors:
        return ""
    rows = [{**row, "shape": " x ".join(map(str, row.get("shape", [])))} for row in tensors]
    table = _table(rows, kind="sortable")
    return (
        f"<h2>Tensors</h2><details open><summary>{len(rows)} tensors; a heading sorts them</summary>{table}</details>"
    )


def _made_by(report: CutReport) -> str:
    made = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    return f'<p class="soft">{html.escape(made)}</p>' if made else ""


def _table(rows: Sequence[Mapping[str, Any]], best: Sequence[bool] = (), said: str = "", kind: str = "") -> str:
    """Rows with the same keys.

    Args:
        rows: what they say.
        best: which of them stand out.
        said: the column that holds sentences.
        kind: class of the table.
    """
    head = "".join(f'<th scope="col">{html.escape(str(key).replace("_", " "))}</th>' for key in rows[0])
    marks = list(best) or [False] * len(rows)
    body = "".join(
        f"<tr{' class=best' if mark else ''}>"
        + "".join(_cell(value, "said" if key == said else "") for key, value in row.items())
        + "</tr>"
        for row, mark in zip(rows, marks, strict=True)
    )
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


def _cell(value: object, kind: str = "") -> str:
    """A number to four digits, with all of them for sorting; what is not defined as a dash."""
    value = strict(value)
    exact = f' data-value="{value!r}"' if isinstance(value, float) else ""
    text = f"{value:.4g}" if isinstance(value, float) and isfinite(value) else "-" if value is None else str(value)
    return f"<td{f' class={kind}' if kind else ''}{exact}>{html.escape(text)}</td>"
