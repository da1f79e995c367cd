"""The tables of RESULTS.md, from the CSV files: means over seeds, `±` the standard deviation over seeds."""

from collections.abc import Callable, Iterable, Sequence

import pandas as pd

from relex_verl.maths.extrapolators import METHODS
from study.grid import ONE_TARGET, Grid

MAIN = ("bf16", "fp32")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A pipe table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: pd.Series) -> str:
    """Mean and standard deviation over seeds."""
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values.mean():.3f}"


def at_step(runs: pd.DataFrame, step: int) -> pd.Series:
    """Accuracy of the real run, by (learning rate, seed)."""
    return runs[(runs.kind == "run") & (runs.step == step)].set_index(["learning_rate", "seed"]).accuracy


def pick(predictions: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """Rows with these values, by (learning rate, seed)."""
    for column, value in wanted.items():
        predictions = predictions[predictions[column] == value]
    return predictions.set_index(["learning_rate", "seed"])


def runs_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """The real runs and their controls."""
    header = ["learning rate", "base", *(f"step {cut}" for cut in grid.cuts), f"step {grid.steps}"]
    header += [f"control: {cut} steps at {grid.steps / cut:.1f} x rate" for cut in grid.cuts]
    header += ["bf16 weights that change a step"]
    rows = []
    for rate, group in runs.groupby("learning_rate"):
        real = group[group.kind == "run"]
        cells = [spread(real[real.step == step].accuracy) for step in (0, *grid.cuts, grid.steps)]
        cells += [spread(group[(group.kind == "control") & (group.step == cut)].accuracy) for cut in grid.cuts]
        rows.append([f"{rate:g}", *cells, f"{real.changed_share.mean():.2%}"])
    return markdown(header, rows)


def end_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """Accuracy of every method's prediction of the last step."""
    header = ["prefix", "method", *(f"{arm}, {rate:g}" for rate in grid.learning_rates for arm in MAIN)]
    rows = []
    for cut in grid.cuts:
        for method in METHODS:
            own = predictions[(predictions.cut == cut) & (predictions.method == method)]
            own = own[own.target == grid.steps]
            cells = [
                spread(own[(own.trajectory == arm) & (own.learning_rate == rate)].accuracy)
                for rate in grid.learning_rates
                for arm in MAIN
            ]
            rows.append([str(cut), method, *cells])
    return markdown(header, rows)


def gain_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """Which share of the real run's gain a prediction of its last step has: from the base, and beyond the prefix's end."""
    base, end = at_step(runs, 0), at_step(runs, grid.steps)
    header = ["prefix", "learning rate", "hold"]
    header += [f"{method}, {arm}" for method in ("relex", "anchored") for arm in MAIN] + ["control"]
    header += [f"beyond hold: {method}, fp32" for method in ("relex", "anchored")] + ["beyond hold: control"]
    rows = []
    for cut in grid.cuts:
        held = pick(predictions, cut=cut, method="hold", trajectory="fp32", target=grid.steps).accuracy
        control = runs[(runs.kind == "control") & (runs.step == cut)].set_index(["learning_rate", "seed"]).accuracy
        found = {
            (method, arm): pick(predictions, cut=cut, method=method, trajectory=arm, target=grid.steps).accuracy
            for method in ("relex", "anchored")
            for arm in MAIN
        }
        for rate in grid.learning_rates:
            from_base = [share(one, base, end, rate) for one in (held, *found.values(), control)]
            late = [found["relex", "fp32"], found["anchored", "fp32"], control]
            rows.append([str(cut), f"{rate:g}", *from_base, *(share(one, held, end, rate) for one in late)])
    return markdown(header, rows)


def share(reached: pd.Series, start: pd.Series, end: pd.Series, rate: float) -> str:
    """(mean reached - mean start) / (mean end - mean start) of a learning rate, and the seeds' smallest and largest."""
    ratio = ((reached - start) / (end - start)).loc[rate]
    whole = (reached.loc[rate].mean() - start.loc[rate].mean()) / (end.loc[rate].mean() - start.loc[rate].mean())
    return f"{whole:.0%} ({ratio.min():.0%} to {ratio.max():.0%})"


def geometry_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """Cosine and norm ratio to the true later delta."""
    header = ["prefix", "learning rate", "target", "hold: cosine, norm"]
    header += [f"{method}, {arm}" for method in ("relex", "anchored") for arm in MAIN]
    rows = []
    for cut in grid.cuts:
        for rate in grid.learning_rates:
            for target in [one for one in grid.targets[cut] if one <= grid.steps]:
                own = predictions[(predictions.cut == cut) & (predictions.learning_rate == rate)]
                cells = [geometry(own[(own.method == "hold") & (own.target == target) & (own.trajectory == "fp32")])]
                cells += [
                    geometry(own[(own.method == method) & (own.target == target) & (own.trajectory == arm)])
                    for method in ("relex", "anchored")
                    for arm in MAIN
                ]
                rows.append([str(cut), f"{rate:g}", str(target), *cells])
    return markdown(header, rows)


def geometry(rows: pd.DataFrame) -> str:
    """Cosine and norm ratio, mean over seeds."""
    return f"{rows.cosine.mean():.2f}, {rows.norm_ratio.mean():.2f}"


def horizon_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """fp32 predictions minus the last observed checkpoint, in points of accuracy: ± over seeds."""
    methods = [one for one in METHODS if one not in ONE_TARGET]
    header = ["prefix", "learning rate", "target", "rate x target", "real run", *methods]
    rows = []
    for cut in grid.cuts:
        own = predictions[(predictions.cut == cut) & (predictions.trajectory == "fp32")]
        held = pick(own, method="hold", target=grid.steps).accuracy
        for rate in grid.learning_rates:
            for target in grid.targets[cut]:
                reached = [at_step(runs, target), *(pick(own, method=one, target=target).accuracy for one in methods)]
                named_target = f"{target} ({target / cut:.1f} x)"
                cells = [points(one, held, rate) for one in reached]
                rows.append([str(cut), f"{rate:g}", named_target, f"{rate * target:.1e}", *cells])
    return markdown(header, rows)


def points(reached: pd.Series, held: pd.Series, rate: float) -> str:
    """Difference of a learning rate in points, or a dash where nothing reached the target."""
    if rate not in reached.index:
        return "-"
    gains = 100 * (reached - held).loc[rate]
    return f"{gains.mean():+.1f} ± {gains.std():.1f}" if len(gains) > 1 else f"{gains.mean():+.1f}"


def searched_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """The target chosen on one half of the test questions, the score taken on the other half; hold is a candidate too."""
    methods = ("relex", "anchored", "anchored-half", "two-point", "raw-ols")
    header = ["prefix", "learning rate", "hold", *(f"{method}, {arm}" for method in methods for arm in MAIN)]
    header += [f"step {grid.steps}"]
    real = runs[(runs.kind == "run") & (runs.step == grid.steps)]
    rows = []
    for cut in grid.cuts:
        for rate in grid.learning_rates:
            own = predictions[(predictions.cut == cut) & (predictions.learning_rate == rate)]
            held = own[(own.method == "hold") & (own.trajectory == "fp32") & (own.target == grid.steps)]
            cells = [spread(held.accuracy_report)]
            for method in methods:
                for arm in MAIN:
                    candidates = own[own.method.isin([method, "hold"]) & (own.trajectory == arm)]
                    best = candidates.loc[candidates.groupby("seed").accuracy_select.idxmax()]
                    cells.append(f"{spread(best.accuracy_report)} at {'/'.join(named(best))}")
            rows.append([str(cut), f"{rate:g}", *cells, spread(real[real.learning_rate == rate].accuracy_report)])
    return markdown(header, rows)


def named(best: pd.DataFrame) -> list[str]:
    """The chosen targets, seed by seed."""
    return [
        "hold" if method == "hold" else str(target) for method, target in zip(best.method, best.target, strict=True)
    ]


def rows_table(grid: Grid, runs: pd.DataFrame, predictions: pd.DataFrame) -> str:
    """About 15 rows in the prefix against a row each step, both float32 int8, to the last step."""
    header = ["prefix", "learning rate", "method", "15 rows: accuracy", "every step: accuracy", "15 rows: cosine, norm"]
    header += ["every step: cosine, norm"]
    rows = []
    for cut in grid.cuts:
        for rate in grid.learning_rates:
            for method in ("relex", "anchored"):
                own = predictions[(predictions.cut == cut) & (predictions.learning_rate == rate)]
                own = own[(own.method == method) & (own.target == grid.steps)]
                pair = [own[own.trajectory == arm] for arm in ("fp32", "fp32-every-step")]
                cells = [spread(one.accuracy) for one in pair] + [geometry(one) for one in pair]
                rows.append([str(cut), f"{rate:g}", method, *cells])
    return markdown(header, rows)


def quantization_table(quantization: pd.DataFrame) -> str:
    """Errors of predictions of the run's end from all rows: the largest over the learning rates."""
    own = quantization[quantization.target == quantization.target[quantization.rows.idxmax()]]
    own = own[own.rows == own.groupby(["encoding", "spacing", "cut"]).rows.transform("max")]
    header = [
        "encoding",
        "prefix",
        "rows",
        "method",
        "error relative to the predicted weights",
        "to the predicted delta",
    ]
    header += ["to the delta, worst tensor"]
    rows = []
    keys = ["encoding", "cut", "spacing", "rows", "method"]
    for (encoding, cut, spacing, count, method), group in own.groupby(keys, sort=False):
        errors = group[["error_of_weights", "error_of_delta", "worst_tensor_error_of_delta"]].max()
        every = "every step" if spacing == 1 else f"every {spacing} steps"
        rows.append([encoding, str(cut), f"{count}, {every}", method, *(f"{one:.1e}" for one in errors)])
    return markdown(header, rows)


def sketch_table(sketches: pd.DataFrame) -> str:
    """Errors of the sketch's predictions: the largest over the learning rates."""
    header = ["rows T", "method", "target", "error relative to the predicted delta", "worst tensor"]
    rows = []
    for (count, method, target), group in sketches.groupby(["rows", "method", "target"], sort=False):
        errors = group[["error_of_delta", "worst_tensor_error_of_delta"]].max()
        rows.append([str(count), method, str(target), *(f"{one:.1e}" for one in errors)])
    return markdown(header, rows)


def agreement_table(agreement: pd.DataFrame) -> str:
    """verl's trainer and the loop's seeds in pairs, then each run's own accuracy."""
    header = ["", "", "observed delta: cosine, norm ratio", "predicted delta: cosine, norm ratio", "accuracy: observed"]
    header += ["accuracy: predicted"]
    rows = []
    for row in agreement.fillna("").to_dict("records"):
        if row["second"]:
            cells = [
                f"{row[f'{what}_cosine']:.3f}, {row[f'{what}_norm_ratio']:.3f}" for what in ("observed", "predicted")
            ]
            rows.append([row["first"], row["second"], *cells, "", ""])
        else:
            cells = [f"{row[f'{what}_accuracy']:.3f}" for what in ("observed", "predicted")]
            rows.append([row["first"], "", "", "", *cells])
    return markdown(header, rows)


def growth_table(quantization: pd.DataFrame) -> str:
    """How relex's error goes with T: the largest over the learning rates, for the run's end and at a fixed ratio."""
    own = quantization[(quantization.method == "relex") & (quantization.cut == quantization.cut.max())]
    end = own.target[own.rows.idxmax()]
    header = [
        "encoding",
        "rows T",
        "last row at step",
        "target",
        "of the weights",
        "of the delta",
        "of the last state's delta",
    ]
    rows = []
    keys = ["encoding", "spacing", "rows", "target"]
    for (encoding, spacing, count, target), group in own.sort_values(keys).groupby(keys):
        errors = group[["error_of_weights", "error_of_delta", "error_of_last_state"]].max()
        said = f"{target} (end)" if target == end else str(target)
        every = "every step" if spacing == 1 else f"every {spacing} steps"
        rows.append([f"{encoding}, {every}", str(count), str(count * spacing), said, *(f"{one:.1e}" for one in errors)])
    return markdown(header, rows)


TABLES: dict[str, Callable[[Grid, pd.DataFrame, pd.DataFrame], str]] = {
    "runs": runs_table,
    "end": end_table,
    "gain": gain_table,
    "horizon": horizon_table,
    "searched": searched_table,
    "geometry": geometry_table,
    "rows": rows_table,
}
