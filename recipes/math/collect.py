"""The paper's tables from what verl's file logger wrote.

    python recipes/math/collect.py outputs/relex_math_eval/qwen3 [--csv table.csv] [--grid MATH]

Table 1: a row a checkpoint, a column a benchmark, and the average. Table 3, where a method was cut at several steps: a row
a cut, a column a target, of one benchmark. Reads `<results>/<checkpoint>/checkpoint.json` and
`<results>/<checkpoint>/*.jsonl`, as evaluate.sh lays them out.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

DATASETS = Path(__file__).with_name("datasets.yaml")
# verl's name of a score: the mean over a prompt's N answers, then over the prompts.
METRIC = re.compile(r"val-core/(?P<source>.+)/(?:acc|reward)/mean@(?P<samples>\d+)")
HEAD = ["Method", "Cut", "Target"]


@dataclass
class Row:
    """One checkpoint.

    Attributes:
        method: its label.
        t_cut: last observed step (None: not a prediction).
        target: predicted step (None: not a prediction, or not for a step).
        scores: percent by column.
        samples: answers a problem by column.
    """

    method: str
    t_cut: int | None
    target: int | None
    scores: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)

    def average(self, columns: list[str]) -> float | None:
        """Mean over all columns; None while one of them is missing."""
        if not columns or any(column not in self.scores for column in columns):
            return None
        return sum(self.scores[column] for column in columns) / len(columns)

    @property
    def predicted(self) -> bool:
        """Whether it was predicted: from steps up to a cut, for a later one or (AlphaRL) for a score."""
        return self.t_cut is not None and (self.target is None or self.target > self.t_cut)

    @property
    def order(self) -> tuple[Any, ...]:
        """What is not a prediction first; then by method, cut and target."""
        return self.predicted, self.method, self.t_cut or 0, self.target or 0


def columns_by_source() -> dict[str, str]:
    """verl's data_source -> the table's column, in the table's order."""
    specs = yaml.safe_load(DATASETS.read_text()).values()
    return {spec["data_source"]: spec["column"] for spec in specs if "column" in spec}


def read_row(folder: Path, columns: dict[str, str]) -> Row:
    """Read one checkpoint's results; where a benchmark was logged twice, the last one counts."""
    facts = json.loads((folder / "checkpoint.json").read_text())
    row = Row(facts["method"], facts.get("t_cut"), facts.get("target"))
    for log in sorted(folder.glob("*.jsonl")):
        for line in log.read_text().splitlines():
            for name, value in json.loads(line)["data"].items():
                match = METRIC.fullmatch(name)
                if match and match["source"] in columns:
                    column = columns[match["source"]]
                    row.scores[column] = 100 * value
                    row.samples[column] = int(match["samples"])
    return row


def collect(results: Path) -> tuple[list[Row], list[str]]:
    """All rows, in the table's order, and the columns that any of them has.

    Raises:
        SystemExit: no results, or one benchmark scored with different numbers of answers: not comparable.
    """
    known = columns_by_source()
    rows = [read_row(path.parent, known) for path in results.glob("*/checkpoint.json")]
    rows = sorted((row for row in rows if row.scores), key=lambda row: row.order)
    if not rows:
        raise SystemExit(f"{results}: no scores in */*.jsonl beside a checkpoint.json")
    columns = [column for column in known.values() if any(column in row.scores for row in rows)]
    for column in columns:
        samples = sorted({row.samples[column] for row in rows if column in row.samples})
        if len(samples) > 1:
            raise SystemExit(f"{column}: scored with {samples} answers a problem; score all rows alike")
    return rows, columns


def cells(rows: list[Row], columns: list[str]) -> list[list[str]]:
    """The table as text, without its head: percent with one decimal, empty where there is no score."""
    return [
        [
            row.method,
            *("" if step is None else str(step) for step in (row.t_cut, row.target)),
            *(
                "" if score is None else f"{score:.1f}"
                for score in (*(row.scores.get(column) for column in columns), row.average(columns))
            ),
        ]
        for row in rows
    ]


def rich_table(rows: list[Row], columns: list[str]) -> Table:
    """The table for a terminal; as in the paper, the best prediction of each column is bold."""
    table = Table(*HEAD)
    for column in columns:
        samples = next(row.samples[column] for row in rows if column in row.samples)
        table.add_column(f"{column}\n{'avg@' + str(samples) if samples > 1 else 'pass@1'}", justify="right")
    table.add_column("Average", justify="right")
    lines = cells(rows, columns)
    predictions = [line for row, line in zip(rows, lines, strict=True) if row.predicted]
    best = [max((float(line[i]) for line in predictions if line[i]), default=None) for i in range(3, 4 + len(columns))]
    for row, line in zip(rows, lines, strict=True):
        marked = [
            f"[bold]{cell}[/bold]" if row.predicted and cell and float(cell) == top else cell
            for cell, top in zip(line[3:], best, strict=True)
        ]
        table.add_row(*line[:3], *marked)
    return table


def grids(rows: list[Row], column: str) -> list[Table]:
    """The paper's Table 3 for each method that was cut at more than one step: one benchmark, its best target a cut bold."""
    steps = [row for row in rows if row.predicted and row.target is not None and column in row.scores]
    beside = [f"{row.method} {row.scores[column]:.1f}" for row in rows if not row.predicted and column in row.scores]
    tables = []
    for method in sorted({row.method for row in steps}):
        scores = {(row.t_cut, row.target): row.scores[column] for row in steps if row.method == method}
        cuts, targets = (sorted({key[i] for key in scores}) for i in (0, 1))
        if len(cuts) > 1:
            table = Table("Cut", title=f"{method}, {column}", caption=", ".join(beside))
            for target in targets:
                table.add_column(str(target), justify="right")
            for cut in cuts:
                line = [scores.get((cut, target)) for target in targets]
                table.add_row(str(cut), *_with_best_bold(line))
            tables.append(table)
    return tables


def _with_best_bold(line: list[float | None]) -> list[str]:
    """One decimal, a dash where there is no checkpoint; ties are all the best."""
    shown = ["—" if score is None else f"{score:.1f}" for score in line]
    best = max(float(cell) for cell, score in zip(shown, line, strict=True) if score is not None)
    return [f"[bold]{cell}[/bold]" if cell != "—" and float(cell) == best else cell for cell in shown]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print evaluate.sh's results as the paper's tables.")
    parser.add_argument("results", type=Path, help="--out of evaluate.sh")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument(
        "--grid", metavar="COLUMN", help="benchmark of the grid of cuts and targets (the first that was scored)"
    )
    options = parser.parse_args(arguments)
    rows, columns = collect(options.results)
    if options.grid not in (None, *columns):
        parser.error(f"--grid {options.grid}: scored are {', '.join(columns)}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([[*HEAD, *columns, "Average"], *cells(rows, columns)])
    # Into a file or a pipe, rich would assume 80 columns and cut cells.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(rich_table(rows, columns))
    for table in grids(rows, options.grid or columns[0]):
        console.print(table)


if __name__ == "__main__":
    main()
