"""Tables of the jump study: from the runs' records to jumps.csv and through_verl.csv, and into RESULTS.md, when asked."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from study.score import write_csv
from study.tables import markdown, spread

LOOP_COLUMNS = ("learning_rate", "seed", "arm", "step", "cost_in_steps", "backward_passes", "accuracy")
VERL_COLUMNS = ("learning_rate", "seed", "arm", "step", "cost_in_steps", "accuracy", "accuracy_validation")


def records(folder: Path) -> list[dict[str, Any]]:
    """`run.json` of every run that is done."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/run.json"))]


def loop_rows(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each scored step of the plain loop; the averages of a plain run are arms of their own."""
    rows = []
    for one in found:
        closed = one.get("gate", {}).get("closed")  # from then on a step is a plain one
        curves = {one["arm"]: one["accuracy"], **{name: one[name] for name in ("ema", "bema") if name in one}}
        for arm, accuracies in curves.items():
            for step, accuracy in accuracies.items():
                known = {"learning_rate": one["learning_rate"], "seed": one["seed"], "arm": arm, "step": int(step)}
                by_rule = min(int(step), closed or int(step))
                passes = int(step) + by_rule * (one["backward_passes_a_step"] - 1)
                rows.append(
                    {**known, "cost_in_steps": one["cost"][step], "backward_passes": passes, "accuracy": accuracy}
                )
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
    """Accuracy by arm, rate and step, means over seeds; in brackets what it cost at the last step."""
    steps = [step for step in steps if (runs.step == step).any()]
    header = ["learning rate", "arm", "seeds", *(f"step {step}" for step in steps), "with scores", "backward passes"]
    rows = []
    for (rate, arm), own in runs.groupby(["learning_rate", "arm"]):
        last = own[own.step == own.step.max()]
        cells = [spread(own[own.step == step].accuracy) for step in steps]
        rows.append([f"{rate:g}", arm, str(own.seed.nunique()), *cells, f"{last.cost_in_steps.mean():.0f} steps"])
        rows[-1].append(f"{last.backward_passes.mean():.0f}")
    return markdown(header, rows)


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


def jump_tables(loop: Path, verl: Path, folder: Path) -> dict[str, str]:
    """Write the CSV files of what is done so far; name of a table -> Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for name, columns, rows in (
        ("jumps", LOOP_COLUMNS, loop_rows(records(loop))),
        ("through_verl", VERL_COLUMNS, verl_rows(records(verl))),
    ):
        if rows:
            write_csv(folder / f"{name}.csv", columns, rows)
            runs = pd.DataFrame(rows)
            tables[name] = verl_table(runs) if name == "through_verl" else loop_table(runs, (20, 60, 100, 160))
    return tables
