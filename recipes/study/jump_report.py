"""Tables of the jump study: from the runs' records to CSV files, and into RESULTS.md, when asked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from study.score import write_csv
from study.tables import markdown, spread

LOOP_COLUMNS = ("learning_rate", "seed", "arm", "step", "cost_in_steps", "backward_passes", "accuracy", "gate_closed")
WATCHING = ("ema", "bema")  # averages of a plain run, no runs
FAR_BELOW = 0.015
VERL_COLUMNS = ("learning_rate", "seed", "arm", "step", "cost_in_steps", "accuracy", "accuracy_validation")


def records(folder: Path) -> list[dict[str, Any]]:
    """`run.json` of every run that is done."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/run.json"))]


def loop_rows(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each scored step of the plain loop; the averages of a plain run are arms of their own."""
    rows = []
    for one in found:
        closed = one.get("gate", {}).get("closed")  # from then on a step is a plain one
        curves = {one["arm"]: one["accuracy"], **{name: one[name] for name in WATCHING if name in one}}
        for arm, accuracies in curves.items():
            for step, accuracy in accuracies.items():
                known = {"learning_rate": one["learning_rate"], "seed": one["seed"], "arm": arm, "step": int(step)}
                by_rule = min(int(step), closed or int(step))
                passes = int(step) + by_rule * (one["backward_passes_a_step"] - 1)
                row = {"cost_in_steps": one["cost"][step], "backward_passes": passes, "accuracy": accuracy}
                rows.append({**known, **row, "gate_closed": closed})
    return rows


def verl_rows(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each scored step of verl's trainer; `jumped` is what a run goes on with after a cut, its scores paid."""
    rows = []
    for one in found:
        known = {"learning_rate": one["learning_rate"], "seed": one["seed"]}
        arm, cuts = "jump" if one["jump"] else "plain", one.get("cuts", [])

        def spent(step: int, at_it: bool, cuts: list = cuts, one: dict = one) -> float:
            before = [cut for cut in cuts if cut["step"] < step or (at_it and cut["step"] == step)]
            return step + sum(cut["samples"] for cut in before) / one["samples_a_step"]

        for step, of in one["accuracy"].items():
            row = {"arm": arm, "step": int(step), "cost_in_steps": spent(int(step), at_it=False)}
            rows.append({**known, **row, "accuracy": of["unseen"], "accuracy_validation": of["validation"]})
        for cut in cuts:
            if cut["after"] is not None:
                row = {"arm": "jumped", "step": cut["step"], "cost_in_steps": spent(cut["step"], at_it=True)}
                after = cut["after"]
                rows.append({**known, **row, "accuracy": after["unseen"], "accuracy_validation": after["validation"]})
    return rows


def loop_table(runs: pd.DataFrame, steps: Iterable[int]) -> str:
    """By rate and arm: accuracies at these steps, means over seeds; at the last one minus the same seeds' plain runs."""
    steps = [step for step in steps if (runs.step == step).any()]
    header = ["learning rate", "arm", "seeds", *(f"step {step}" for step in steps), "minus plain, points"]
    header += ["with scores", "backward passes", "gate closed at"]
    rows = []
    for (rate, arm), own in runs.groupby(["learning_rate", "arm"]):
        last = own[own.step == own.step.max()]
        cells = [spread(own[own.step == step].accuracy) for step in steps]
        gains = 100 * beside_plain(runs[(runs.learning_rate == rate) & runs.arm.isin([arm, "plain"])]).difference
        cells.append("" if arm == "plain" else f"{gains.mean():+.1f}" if len(gains) else "-")
        cells += [f"{last.cost_in_steps.mean():.0f} steps", f"{last.backward_passes.mean():.0f}"]
        closed = [f"{step:.0f}" for step in last.sort_values("seed").gate_closed.dropna()]
        rows.append([f"{rate:g}", arm, str(own.seed.nunique()), *cells, ", ".join(closed)])
    return markdown(header, rows)


def beside_plain(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run at the last step that its plain twin has too: `accuracy`, `accuracy_plain` and their `difference`."""
    known = ["learning_rate", "seed", "step"]
    plain = runs[runs.arm == "plain"][[*known, "accuracy"]]
    pairs = runs[runs.arm != "plain"].merge(plain, on=known, suffixes=("", "_plain"))
    last = pairs.groupby(["learning_rate", "seed", "arm"]).step.transform("max")
    pairs = pairs[pairs.step == last]
    return pairs.assign(difference=pairs.accuracy - pairs.accuracy_plain)


def below_table(trainers: dict[str, pd.DataFrame]) -> str:
    """Each run that ends more than 1.5 points below its plain twin at equal real steps."""
    header = ["trained by", "learning rate", "seed", "arm", "step", "accuracy", "plain", "points"]
    rows, compared = [], 0
    for name, runs in trainers.items():
        pairs = beside_plain(runs[~runs.arm.isin([*WATCHING, "jumped"])])
        compared += len(pairs)
        for one in pairs[pairs.difference < -FAR_BELOW].itertuples():
            cells = [f"{one.learning_rate:g}", str(one.seed), one.arm, str(one.step), f"{one.accuracy:.3f}"]
            rows.append([name, *cells, f"{one.accuracy_plain:.3f}", f"{100 * one.difference:+.1f}"])
    return f"{len(rows)} of {compared} runs.\n\n{markdown(header, rows)}" if rows else f"None of {compared} runs."


def verl_table(runs: pd.DataFrame) -> str:
    """Each seed's jump run beside its plain twin: the plain run's last accuracy, and when the other one had it."""
    header = ["learning rate", "seed", "plain, last step", "with jumps, step 60", "after its jump", "step 100"]
    header += ["plain, step 60", "step 100", "reached plain's last at step", "in steps with all scores"]
    rows = []
    for (rate, seed), own in runs.groupby(["learning_rate", "seed"]):
        plain, jump = own[own.arm == "plain"], own[own.arm.isin(["jump", "jumped"])]
        if not len(plain) or not len(jump):
            continue
        goal = plain[plain.step == plain.step.max()].iloc[0]
        there = jump[(jump.step > 0) & (jump.accuracy >= goal.accuracy)].sort_values("cost_in_steps")
        reached = ["not", "-"] if there.empty else [str(there.step.iloc[0]), f"{there.cost_in_steps.iloc[0]:.0f}"]
        cells = [_at(jump, "jump", 60), _at(jump, "jumped", 60), _at(jump, "jump", 100)]
        cells += [_at(plain, "plain", 60), _at(plain, "plain", 100)]
        rows.append([f"{rate:g}", str(seed), f"{goal.accuracy:.3f} ({goal.step})", *cells, *reached])
    return markdown(header, rows)


def _at(runs: pd.DataFrame, arm: str, step: int) -> str:
    found = runs[(runs.arm == arm) & (runs.step == step)]
    return f"{found.accuracy.iloc[0]:.3f}" if len(found) else "-"


def jump_tables(out: Path, folder: Path) -> dict[str, str]:
    """Write the CSV files of what is done so far below `out`; name of a table -> Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, trainers = {}, {}
    for name, source, columns, rows_of in (
        ("jumps", "loop", LOOP_COLUMNS, loop_rows),
        ("jumps_three_digit", "loop-three-digit", LOOP_COLUMNS, loop_rows),
        ("through_verl", "verl", VERL_COLUMNS, verl_rows),
    ):
        if rows := rows_of(records(out / source)):
            write_csv(folder / f"{name}.csv", columns, rows)
            runs = trainers[source] = pd.DataFrame(rows)
            tables[name] = verl_table(runs) if name == "through_verl" else loop_table(runs, (20, 60, 100, 160))
    return tables | {"jumps_below": below_table(trainers)}
