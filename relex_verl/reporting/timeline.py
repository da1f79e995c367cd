"""The cuts of a run in their order: where it jumped, from what to what, and the scores that each of them rests on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relex_verl.reporting.drawing import COLOURS, DOTS, LINE, NULL, label_figure, new_figure, save_figure, styled
from relex_verl.reporting.findings import CutReport, EarlierCut

__all__ = ["cuts", "timeline_figure", "timeline_rows"]


def cuts(report: CutReport) -> list[EarlierCut]:
    """All of the run so far, that of the report the last; empty where that is the only one and did not jump."""
    found = [*report.earlier_cuts, report.summary]
    return found if len(found) > 1 or report.advice.action in ("jump", "undo") else []


def timeline_rows(report: CutReport) -> list[dict[str, Any]]:
    """A row a cut: what was done, to which step and how far that is ahead, and what weights scored, on all prompts.

    `prediction` is the score of what was jumped to, of an undone jump that of the weights which are back.
    """
    rows = []
    for cut in cuts(report):
        advice, scored = cut.advice, cut.validation_scores
        target = None if advice.target is None else advice.target.target
        of_target = {row.name: row.score for row in scored}.get(
            "" if advice.target is None else advice.target.folder_name
        )
        rows.append(
            {
                "step": cut.t_cut,
                "window from": cut.origin_step or 0,
                "action": advice.action,
                "target": target,
                "horizon": None if target is None else target - cut.t_cut,
                "observed": scored[0].score if scored else None,
                "prediction": advice.hold_score if advice.action == "undo" else of_target,
                "p_value": advice.p_value,
                "validations": len(scored),
                "samples": sum(row.prompts if row.samples is None else row.samples for row in scored),
            }
        )
    return rows


def timeline_figure(folder: Path, report: CutReport) -> Path | None:
    """Jumps over the reward curve, and beside it the curve of scores of each cut.

    Args:
        folder: where the files go.
        report: of the last cut.

    Returns:
        The PNG file; None where there is nothing to show beyond the one cut.
    """
    found = cuts(report)
    if not found:
        return None
    rewards = {int(step): value for cut in found for step, value in (cut.rewards or {}).items()}
    paths = _draw(folder / "timeline", timeline_rows(report), rewards, [(cut.t_cut, _curve(cut)) for cut in found])
    return next(path for path in paths if path.suffix == ".png")


def _curve(cut: EarlierCut) -> list[tuple[float, float]]:
    """(horizon in windows, score above the observed weights'), the observed weights at 1."""
    if not cut.validation_scores:
        return []
    hold, *predicted = cut.validation_scores
    origin = cut.origin_step or 0
    points = [((row.target - origin) / (cut.t_cut - origin), row.score - hold.score) for row in predicted]
    return [(1.0, 0.0), *sorted(points)]


@styled
def _draw(
    stem: Path,
    rows: Sequence[Mapping[str, Any]],
    rewards: Mapping[int, float],
    curves: Sequence[tuple[int, Sequence[tuple[float, float]]]],
) -> list[Path]:
    figure = new_figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    if rewards:
        steps = sorted(rewards)
        left.plot(steps, [rewards[step] for step in steps], color=NULL, linewidth=0.8, alpha=0.7, label="mean reward")
    scored = [row for row in rows if row["observed"] is not None]
    left.plot(
        [row["step"] for row in scored], [row["observed"] for row in scored], "o", color=DOTS, markersize=4,
        label="observed, validation",
    )  # fmt: skip
    for action, colour, label in (("jump", LINE, "jump"), ("undo", COLOURS[3], "jump undone")):
        made = [row for row in scored if row["action"] == action and row["prediction"] is not None]
        for i, row in enumerate(made):
            ends = [row["observed"], row["prediction"]]
            left.plot([row["step"]] * 2, ends, color=colour, linewidth=1.5, label=label if i == 0 else None)
            left.plot(row["step"], ends[1], "^" if ends[1] >= ends[0] else "v", color=colour, markersize=5)
    left.legend(fontsize=8)
    left.set_xlabel("training step")
    right.axhline(0, color=NULL, linestyle="--", linewidth=1)
    for i, (step, curve) in enumerate(curves):
        if len(curve) > 1:
            x, y = zip(*curve, strict=True)
            right.plot(x, y, "o-", color=COLOURS[i % 7], markersize=3, linewidth=1, label=f"step {step}")
    if right.get_legend_handles_labels()[1]:
        right.set_xscale("log", base=2)
        right.legend(fontsize=8, ncols=2)
    right.set_xlabel("predicted step, in windows")
    right.set_ylabel("score above the observed weights")
    label_figure(figure, "", "", "The run, and the search at each cut")
    return save_figure(figure, stem)
