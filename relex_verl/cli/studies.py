"""The paper's analyses of a trajectory: diagnose, compare, backtest, sweep."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from relex_verl import analysis, plots, replay, report, tracking
from relex_verl.cli.common import (
    AsJson,
    Cut,
    OutFolder,
    Rank,
    TrajectoryFolder,
    clear_errors,
    console,
    element_bar,
    methods_of,
    print_json,
    step_bar,
    steps_of,
    table_of,
)
from relex_verl.diagnostics import describe, random_walk_gram, spectrum
from relex_verl.ingest import find_checkpoints, select_steps
from relex_verl.trajectory import Trajectory

__all__ = ["backtest", "compare", "diagnose", "sweep"]

Figures = Annotated[Path | None, typer.Option("--out", help="Folder for the figures, PNG and SVG.")]
Methods = Annotated[str, typer.Option("--method", help="Methods separated by commas.")]


def diagnose(
    trajectory: TrajectoryFolder,
    out: Figures = None,
    t_cut: Cut = None,
    rank: Rank = 1,
    target: Annotated[str | None, typer.Option(help="Draw the lines on to these steps.")] = None,
    as_json: AsJson = False,
) -> None:
    """How low-rank and how straight each tensor's path is (the paper's Findings 1 and 2, Figures 4 and 5).

    Explained variance and R2 say little alone: the row "random walk" shows what directionless noise gives over the same
    steps. With --out: coefficients with their lines, leading components, spectrum, R2 and explained variance by layer.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        steps, gram_LTT = opened.steps_until(t_cut), replay.gram(opened, t_cut)
        shapes = [opened.index.tensors[name] for name in opened.names]
        fits = tracking.fit_report(opened.names, shapes, gram_LTT, steps, rank)
        targets = steps_of(target, "--target") if target else []
        figures = _figures(out, opened, gram_LTT, steps, targets) if out else {}
    if as_json:
        print_json({"steps": steps, **fits, "figures": {name: str(path) for name, path in figures.items()}})
        return
    rows = [{**row, "shape": "x".join(map(str, row["shape"]))} for row in fits["tensors"]]
    blank = dict.fromkeys(rows[0])
    console.print(
        table_of("tensors", [*rows, {**blank, "tensor": "random walk", "shape": "", **fits["random_walk_null"]}])
    )
    for name, path in figures.items():
        console.print(f"{name.replace('_', ' ')}: {path}", highlight=False, soft_wrap=True)


def _figures(
    out: Path, opened: Trajectory, gram_LTT: Any, steps: Sequence[int], targets: Sequence[int]
) -> dict[str, Path]:
    figures = report.window_figures(out, opened.names, gram_LTT, steps, targets, ["relex"])
    if not gram_LTT[:, -1, -1].any():
        return figures
    chosen = int(gram_LTT[:, -1, -1].argmax())
    of = spectrum(gram_LTT[chosen : chosen + 1])
    count = min(5, len(steps))
    signs = of.vectors_LTT[0, -1, :count].sign()
    components = (of.vectors_LTT[0, :, :count] * signs * of.values_LT[0, :count].sqrt()).T.tolist()
    shares = (of.values_LT[0, :count] / of.values_LT[0, :count].sum()).tolist()
    title = f"{opened.names[chosen]}: variance within rank {count}"
    figures["components"] = plots.plot_components(out / "components", title, steps, components, shares)[0]
    by_module: dict[str, dict[int, float]] = {}
    for name, value in zip(opened.names, describe(gram_LTT, steps)["explained_variance"].tolist(), strict=True):
        layer, module = report.layer_and_module(name)
        by_module.setdefault(module, {})[layer] = value
    null = describe(random_walk_gram(steps), steps)["explained_variance"].item()
    stem = out / "explained_variance_by_layer"
    figures[stem.name] = plots.plot_r2_by_layer(stem, by_module, "explained variance", null)[0]
    return figures


def compare(
    trajectory: TrajectoryFolder,
    checkpoints: Annotated[Path, typer.Option(help="Folder with the true checkpoints of later steps.")],
    t_cut: Annotated[int, typer.Option(help="Fit on the observed steps up to this one.")],
    method: Methods = "relex,hold",
    steps: Annotated[
        str | None, typer.Option(help="Which true steps, e.g. 100-500; all later ones if not given.")
    ] = None,
    rank: Rank = 1,
    out: Figures = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Use *.bin and verl's *.pt files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predictions against the true later checkpoints: cosine and norm ratio of the deltas (Figure 6, Appendix B).

    Cosine 1 and ratio 1 is the true checkpoint; `hold`, the last observed one, is what a prediction has to beat. The
    "reconstruction" lines are Algorithm 1 within the observed steps.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        found = [one for one in find_checkpoints(checkpoints) if one.step > t_cut]
        chosen = select_steps(found, steps)
        methods = methods_of(method)
        observed, gram_LTT = opened.steps_until(t_cut), replay.gram(opened, t_cut)
        with element_bar(opened, "comparing", len(chosen)) as advance:
            aligned = analysis.compare(opened, t_cut, methods, chosen, rank, allow_pickle, advance)
        aligned += analysis.reconstruction_alignment(gram_LTT, observed, rank)
        figures = _alignment_figure(out, aligned, f"fitted up to step {observed[-1]}") if out else []
    rows = []
    for one in aligned:
        cosine, ratio = (analysis.spread(one.step, values, "mean") for values in (one.cosine, one.ratio))
        row = {
            "method": one.method,
            "step": one.step,
            "cosine": cosine and cosine.middle,
            "ratio": ratio and ratio.middle,
        }
        rows.append({**row, "model_cosine": one.model_cosine, "model_ratio": one.model_ratio})
    if as_json:
        tensors = [asdict(one) for one in aligned]
        print_json(
            {"names": opened.names, "rows": rows, "tensors": tensors, "figures": [str(path) for path in figures]}
        )
        return
    console.print(table_of("mean over the tensors, and all of them as one vector", rows))
    for path in figures:
        console.print(str(path), highlight=False, soft_wrap=True)


def _alignment_figure(out: Path, aligned: Sequence[analysis.Alignment], title: str) -> list[Path]:
    cosine: dict[str, list[plots.Spread]] = {}
    ratio: dict[str, list[plots.Spread]] = {}
    for one in aligned:
        for series, values in ((cosine, one.cosine), (ratio, one.ratio)):
            point = analysis.spread(one.step, values, "mean")
            if point is not None:
                series.setdefault(one.method, []).append(point)
    return plots.plot_alignment(out / "alignment", cosine, ratio, title)


def backtest(
    trajectory: TrajectoryFolder,
    method: Methods = "relex,anchored,two-point",
    t_cut: Cut = None,
    rank: Rank = 1,
    out: Figures = None,
    as_json: AsJson = False,
) -> None:
    """Predict the last observed row from each prefix, and compare with simply keeping the prefix's last checkpoint.

    An error below 1 means that the prediction lies nearer to what came than that checkpoint does. Nothing is scored on
    any task, and no weights are read.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        steps, gram_LTT = opened.steps_until(t_cut), replay.gram(opened, t_cut)
        rows = analysis.backtests(gram_LTT, steps, methods_of(method), rank)
        if not rows:
            raise ValueError(f"{trajectory} holds {len(steps)} observed steps: a backtest of {method} needs more")
        series: dict[str, list[plots.Spread]] = {}
        for row in rows:
            point = plots.Spread(row["prefix"], row["median"], row["p10"], row["p90"])
            series.setdefault(row["method"], []).append(point)
        figures = plots.plot_backtest(out / "backtest", series, f"predicting step {steps[-1]}") if out else []
    if as_json:
        print_json({"rows": rows, "figures": [str(path) for path in figures]})
        return
    console.print(table_of(f"error of predicting step {steps[-1]}, 1 = keeping the prefix's last checkpoint", rows))
    for path in figures:
        console.print(str(path), highlight=False, soft_wrap=True)


def sweep(
    trajectory: TrajectoryFolder,
    t_cut: Annotated[str, typer.Option(help="Cuts separated by commas, e.g. 50,75,100,125.")],
    target: Annotated[str, typer.Option(help="Targets separated by commas, e.g. 200,300,...,1000.")],
    out: OutFolder,
    method: Methods = "relex",
    rank: Rank = 1,
    as_json: AsJson = False,
) -> None:
    """Write a grid of predictions (the paper's Table 3) and OUT/manifest.json, which an evaluator can walk.

    Interrupted, the same command goes on: what is complete is not written again.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        cuts, targets, methods = steps_of(t_cut, "--t-cut"), steps_of(target, "--target"), methods_of(method)
        pairs = [(cut, step) for cut in cuts for step in targets if step > cut]
        if not pairs:
            raise ValueError(f"--target {target} has no step after --t-cut {t_cut}: give later targets or earlier cuts")
        with step_bar("predicting", len(pairs) * len(methods) * opened.elements) as advance:
            written = analysis.sweep(
                opened, cuts, targets, methods, out, rank, lambda title, done: advance(done, title)
            )
    if as_json:
        print_json({"manifest": str(out / "manifest.json"), "predictions": written})
        return
    console.print(table_of("predictions", written))
    console.print(f"{out / 'manifest.json'}", highlight=False, soft_wrap=True)
