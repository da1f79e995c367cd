"""From the runs' folders to one folder of CSV files, tables and figures; and into RESULTS.md, when asked."""

import re
import shutil
from pathlib import Path

import pandas as pd

from study.grid import Grid
from study.plots import FIGURES
from study.score import write_csv
from study.tables import TABLES, agreement_table, growth_table, quantization_table, sketch_table
from study.train import read_record

PAGE = Path(__file__).parent / "RESULTS.md"
RUN_COLUMNS = (
    "learning_rate",
    "seed",
    "kind",
    "step",
    "accuracy",
    "accuracy_select",
    "accuracy_report",
    "changed_share",
)


def collect_runs(grid: Grid, out: Path, path: Path) -> None:
    """`runs.csv`: test accuracy of the real runs at each kept step, and of their controls."""
    rows = []
    for run in grid.runs():
        record = read_record(out, run)
        known = {"learning_rate": run.learning_rate, "seed": run.seed}
        changed = record["changed_shares"]["bf16"]
        for step in record["accuracy"]:
            scores = {key: record[key][step] for key in ("accuracy", "accuracy_select", "accuracy_report")}
            row = {**known, "kind": "run", "step": int(step), **scores, "changed_share": sum(changed) / len(changed)}
            rows.append(row)
        for cut, accuracy in record["control"].items():
            rows.append({**known, "kind": "control", "step": int(cut), "accuracy": accuracy})
    write_csv(path, RUN_COLUMNS, rows)


def collect(grid: Grid, out: Path, name: str, path: Path) -> None:
    """Put a CSV file of all runs that have one end to end."""
    found = [out / run.name / name for run in grid.runs()]
    pd.concat([pd.read_csv(one) for one in found if one.exists()]).to_csv(path, index=False, lineterminator="\n")


def write_report(grid: Grid, out: Path, page: Path | None) -> Path:
    """Write `results/` below `out`; with a page, copy it beside that page and fill in the page's tables."""
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    collect_runs(grid, out, folder / "runs.csv")
    collect(grid, out, "predictions.csv", folder / "predictions.csv")
    collect(grid, out, "quantization.csv", folder / "quantization.csv")
    collect(grid, out, "sketch.csv", folder / "sketch.csv")
    runs, predictions = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "predictions.csv")
    tables = {name: table(grid, runs, predictions) for name, table in TABLES.items()}
    quantization = pd.read_csv(folder / "quantization.csv")
    tables["quantization"], tables["growth"] = quantization_table(quantization), growth_table(quantization)
    tables["sketch"] = sketch_table(pd.read_csv(folder / "sketch.csv"))
    if (out / "agreement.csv").exists():
        shutil.copy(out / "agreement.csv", folder / "agreement.csv")
        tables["agreement"] = agreement_table(pd.read_csv(folder / "agreement.csv"))
    (folder / "tables.md").write_text("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()) + "\n")
    for name, figure in FIGURES.items():
        figure(grid, runs, predictions, folder / f"{name}.png")
    if page is not None:
        shutil.copytree(folder, page.parent / "results", dirs_exist_ok=True)
        fill(page, tables)
    return folder


def fill(page: Path, tables: dict[str, str]) -> None:
    """Replace what stands between `<!-- table NAME -->` and `<!-- end -->`; tables that are not given stay as they are."""
    pattern = re.compile(r"<!-- table (\w+) -->\n.*?<!-- end -->", re.DOTALL)

    def filled(found: re.Match[str]) -> str:
        table = tables.get(found[1])
        return found[0] if table is None else f"<!-- table {found[1]} -->\n{table}\n<!-- end -->"

    text = pattern.sub(filled, page.read_text())
    page.write_text(text)
