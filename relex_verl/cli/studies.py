"""The paper's analyses of a trajectory: diagnose, compare, backtest, sweep."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from relex_verl.cli.arguments import (
    AllowPickle,
    AsJson,
    BaseNow,
    Checkpoints,
    Cut,
    FitFrom,
    Hub,
    OutFolder,
    Rank,
    Revisions,
    StepPattern,
    TrajectoryFolder,
    WindowNumber,
    methods_of,
    steps_of,
    tensors_of,
)
from relex_verl.cli.figures import alignment_figure, backtest_figure, diagnosis_figures
from relex_verl.cli.screen import clear_errors, console, element_bar, print_json, step_bar, table_of
from relex_verl.offline import analysis
from relex_verl.offline.ingest import Found, IngestError, checkpoints_in, select_steps, within
from relex_verl.reporting.metrics import fit_report
from relex_verl.trajectory.index import step_ranges
from relex_verl.trajectory.store import Trajectory

__all__ = ["backtest", "compare", "diagnose", "sweep"]

Figures = Annotated[Path | None, typer.Option("--out", help="Folder for the figures, PNG and SVG.")]
Methods = Annotated[str, typer.Option("--method", help="Methods separated by commas.")]


def diagnose(
    trajectory: TrajectoryFolder,
    out: Figures = None,
    t_cut: Cut = None,
    fit_from: FitFrom = 1,
    rank: Rank = 1,
    target: Annotated[str | None, typer.Option(help="Draw the lines on to these steps.")] = None,
    tensor: Annotated[
        str | None,
        typer.Option(
            help="Draw the coefficients and components of these, names or parts of names; else what moved most."
        ),
    ] = None,
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """How low-rank and how straight each tensor's path is (the paper's Findings 1 and 2, Figures 4 and 5).

    Explained variance and R2 say little alone: the row "random walk" shows what directionless noise gives over the same
    steps. With --out: coefficients with their lines, leading components, spectrum, R2 and explained variance by layer. Of a
    sketch only the explained variance is known.
    """
    with clear_errors():
        opened = Trajectory(trajectory, window, base)
        fitted = analysis.window(opened, t_cut, fit_from)
        shapes = [opened.index.tensors[name] for name in opened.names]
        fits = fit_report(fitted, shapes, rank)
        targets = steps_of(target, "--target") if target else []
        chosen = tensors_of(tensor, opened.names) if tensor else []
        figures = diagnosis_figures(out, fitted, targets, chosen) if out else {}
    if as_json:
        shown = {name: str(path) for name, path in figures.items()}
        print_json({"steps": list(fitted.steps), **vars(fits), "figures": shown})
        return
    table = [{**row, "shape": "x".join(map(str, row["shape"]))} for row in fits.tensors]
    blank = dict.fromkeys(table[0])
    console.print(
        table_of("tensors", [*table, {**blank, "tensor": "random walk", "shape": "", **fits.random_walk_null}])
    )
    for name, path in figures.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)


def compare(
    trajectory: TrajectoryFolder,
    t_cut: Annotated[int, typer.Option(help="Fit on the observed steps up to this one.")],
    checkpoints: Checkpoints = None,
    hub: Hub = None,
    revisions: Revisions = "step_{N}",
    step_pattern: StepPattern = None,
    method: Methods = "relex,hold",
    steps: Annotated[
        str | None, typer.Option(help="Which true steps, e.g. 100-500 or 100,200; all later ones if not given.")
    ] = None,
    rank: Rank = 1,
    fit_from: FitFrom = 1,
    reconstruct_cut: Annotated[
        int | None, typer.Option(help="Reconstruct from the steps up to this one; from all of them if not given.")
    ] = None,
    out: Figures = None,
    allow_pickle: AllowPickle = False,
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Predictions against the true later weights: cosine and norm ratio of the deltas (Figure 6, Appendix B).

    The truth is in --checkpoints or --hub; without them it is the trajectory's own later steps. Cosine 1 and ratio 1 is the
    true checkpoint; `hold`, the last step before the cut, is what a prediction has to beat. The "reconstruction" lines are
    Algorithm 1 over the whole trajectory: a projection, so its norm ratio is its cosine.
    """
    with clear_errors():
        opened, methods = Trajectory(trajectory, window, base), methods_of(method)
        fit = {"rank": rank, "fit_from": fit_from}
        if checkpoints is None and hub is None:
            aligned = analysis.align_observed(opened, t_cut, methods, _later_steps(opened, t_cut, steps), **fit)
        else:
            true = _later_checkpoints(checkpoints_in(checkpoints, hub, revisions, step_pattern), t_cut, steps)
            with element_bar(opened, "comparing", len(true)) as advance:
                aligned = analysis.align_checkpoints(
                    opened, t_cut, methods, true, **fit, allow_pickle=allow_pickle, progress=advance
                )
        if opened.kind.keeps_rows:  # it keeps no row that could be given back
            rebuilt = analysis.align_reconstruction(analysis.window(opened, reconstruct_cut), rank)
            aligned += [alignment for alignment in rebuilt if _chosen([alignment.step], steps)]
        figures = alignment_figure(out, aligned, f"fitted up to step {t_cut}") if out else []
    rows = [_alignment_row(alignment) for alignment in aligned]
    if as_json:
        tensors = [asdict(alignment) for alignment in aligned]
        print_json(
            {"names": opened.names, "rows": rows, "tensors": tensors, "figures": [str(path) for path in figures]}
        )
        return
    console.print(table_of("mean over the tensors, and all of them as one vector", rows))
    for path in figures:
        console.print(str(path), highlight=False, soft_wrap=True)


def _later_steps(trajectory: Trajectory, cut: int, among: str | None) -> list[int]:
    """The trajectory's own steps after a cut."""
    later = _chosen([step for step in trajectory.steps if step > cut], among)
    if not later:
        raise IngestError(
            f"{trajectory.folder} holds no such step after --t-cut {cut}, only {step_ranges(trajectory.steps)}: cut "
            "earlier, or give true --checkpoints"
        )
    return later


def _later_checkpoints(there: tuple[list[Found], str], cut: int, among: str | None) -> list[Found]:
    """The true checkpoints after a cut, of those in a place."""
    found, place = there
    true = [checkpoint for checkpoint in found if checkpoint.step > cut]
    if not true:
        known = step_ranges([checkpoint.step for checkpoint in found])
        raise IngestError(f"{place} holds no step after --t-cut {cut}, only {known}: cut earlier")
    return select_steps(true, among)


def _alignment_row(alignment: analysis.Alignment) -> dict[str, Any]:
    cosine, ratio = (analysis.spread(alignment.step, values, "mean") for values in (alignment.cosine, alignment.ratio))
    means = {"cosine": cosine and cosine.middle, "ratio": ratio and ratio.middle}
    return {
        "method": alignment.method,
        "step": alignment.step,
        **means,
        "model_cosine": alignment.model_cosine,
        "model_ratio": alignment.model_ratio,
    }


def _chosen(steps: Sequence[int], among: str | None) -> list[int]:
    return [step for step in steps if among is None or within(among)(step)]


def backtest(
    trajectory: TrajectoryFolder,
    method: Methods = "relex,anchored,two-point",
    t_cut: Cut = None,
    fit_from: FitFrom = 1,
    rank: Rank = 1,
    out: Figures = None,
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Predict the last observed row from each prefix, and compare with simply keeping the prefix's last checkpoint.

    An error below 1 means that the prediction lies nearer to what came than that checkpoint does. Nothing is scored on
    any task, and no weights are read.
    """
    with clear_errors():
        opened = Trajectory(trajectory, window, base)
        opened.row_codec()  # a sketch's rows are smoothed by the last one, too
        fitted = analysis.window(opened, t_cut, fit_from)
        steps, rows = fitted.steps, analysis.backtests(fitted, methods_of(method), rank)
        if not rows:
            raise ValueError(f"{trajectory} holds {len(steps)} observed steps: a backtest of {method} needs more")
        figures = backtest_figure(out, rows, steps[-1]) if out else []
    if as_json:
        print_json({"rows": rows, "figures": [str(path) for path in figures]})
        return
    console.print(table_of(f"error of predicting step {steps[-1]}, 1 = keeping the prefix's last checkpoint", rows))
    for path in figures:
        console.print(str(path), highlight=False, soft_wrap=True)


def sweep(
    trajectory: TrajectoryFolder,
    t_cut: Annotated[str, typer.Option(help="Cuts separated by commas, e.g. 50,75,100,125.")],
    target: Annotated[
        str,
        typer.Option(
            help="Targets separated by commas, e.g. 200,300,400,500,750,1000; 200,...,1000 is every 100 steps."
        ),
    ],
    out: OutFolder,
    method: Methods = "relex",
    rank: Rank = 1,
    fit_from: FitFrom = 1,
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Write a grid of predictions (the paper's Table 3) and OUT/manifest.json, which an evaluator can walk.

    Interrupted, the same command goes on: what is complete is not written again.
    """
    with clear_errors():
        opened = Trajectory(trajectory, window, base)
        cuts, targets, methods = steps_of(t_cut, "--t-cut"), steps_of(target, "--target"), methods_of(method)
        pairs = [(cut, step) for cut in cuts for step in targets if step > cut]
        if not pairs:
            raise ValueError(f"--target {target} has no step after --t-cut {t_cut}: give later targets or earlier cuts")
        with step_bar("predicting", len(pairs) * len(methods) * opened.elements) as advance:

            def progress(title: str, elements: int) -> None:
                advance(elements, title)

            written = analysis.sweep(opened, cuts, targets, methods, out, rank, fit_from, progress)
    if as_json:
        print_json({"manifest": str(out / "manifest.json"), "predictions": written})
        return
    console.print(table_of("predictions", written))
    console.print(f"{out / 'manifest.json'}", highlight=False, soft_wrap=True)
