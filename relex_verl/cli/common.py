"""What the commands share: options, the console, bars, tables, and errors in one line."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from relex_verl.budget import BudgetError
from relex_verl.extrapolators import METHODS
from relex_verl.ingest import IngestError
from relex_verl.trajectory import Trajectory, TrajectoryError

__all__ = [
    "AsJson",
    "Cut",
    "OutFolder",
    "Rank",
    "TrajectoryFolder",
    "clear_errors",
    "console",
    "element_bar",
    "methods_of",
    "print_json",
    "step_bar",
    "steps_of",
    "table_of",
]

console = Console()

TrajectoryFolder = Annotated[
    Path,
    typer.Argument(metavar="TRAJECTORY", help="Folder with index.json: output_dir/trajectory, or what ingest wrote."),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Where to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Rank = Annotated[int, typer.Option(min=1, help="Directions kept for each tensor; the paper uses 1.")]
Cut = Annotated[int | None, typer.Option(help="Use the observed steps up to this one; all of them if not given.")]


def steps_of(text: str, option: str) -> list[int]:
    """Whole step numbers separated by commas; a range with `...` goes on as it began: 200,400,...,1000.

    Raises:
        ValueError: anything else, naming the option.
    """
    cure = f"{option} {text}: give whole step numbers separated by commas, e.g. 50,75 or 200,400,...,1000"
    parts, steps = [part.strip() for part in text.split(",")], list[int]()
    try:
        for i, part in enumerate(parts):
            if part in ("...", "…"):
                stride, end = (steps[-1] - steps[-2] if len(steps) > 1 else 100), int(parts[i + 1])
                if stride <= 0:
                    raise ValueError(cure)
                steps += range(steps[-1] + stride, end, stride)
            else:
                steps.append(int(part))
    except (ValueError, IndexError):
        raise ValueError(cure) from None
    if min(steps) < 1:
        raise ValueError(f"{option} {text}: steps start at 1")
    return sorted(set(steps))


def methods_of(text: str) -> list[str]:
    """Names in METHODS separated by commas.

    Raises:
        ValueError: another name.
    """
    methods = [part.strip() for part in text.split(",")]
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--method {method}: give one of {', '.join(METHODS)}")
    return methods


def print_json(content: Any) -> None:
    """JSON on standard output, without colour or wrapping; NaN is null."""
    typer.echo(json.dumps(_without_nan(content), indent=1))


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and content - content != 0 else content


def table_of(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """A rich table of rows with the same keys; numbers to four digits, undefined ones as -."""
    table = Table(title=title)
    for key in rows[0] if rows else ("nothing",):
        left = not rows or isinstance(rows[0][key], str)
        table.add_column(key.replace("_", " "), justify="left" if left else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda amount=1, title=None: progress.update(task, advance=amount, description=title)


@contextmanager
def element_bar(trajectory: Trajectory, title: str, times: int = 1) -> Iterator[Any]:
    """A bar over the elements of all tensors (so many times); yields the function that advances it."""
    with _bar(title, trajectory.elements * times) as advance:
        yield advance


@contextmanager
def step_bar(title: str, total: int) -> Iterator[Any]:
    """A bar over steps; yields the function that advances it."""
    with _bar(title, total) as advance:
        yield advance


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is said in one line; anything else is ours and keeps its traceback."""
    try:
        yield
    except (TrajectoryError, IngestError, BudgetError, ValueError, OSError) as error:
        said = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print("error:", said, style=None, highlight=False, markup=False)
        raise typer.Exit(1) from None
