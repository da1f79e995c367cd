"""What the commands show: JSON, tables, bars, and errors in one line."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from relex_verl.offline.ingest import IngestError
from relex_verl.reporting.records import strict
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import Trajectory

__all__ = ["clear_errors", "console", "element_bar", "notes", "print_json", "step_bar", "table_of"]

# Into a file or a pipe, rich would assume 80 columns and cut names.
console = Console(width=None if sys.stdout.isatty() else 1000)
notes = Console(stderr=True, soft_wrap=True)  # what is no result: standard output may be JSON


def print_json(content: Any) -> None:
    """JSON on standard output, without colour or wrapping; NaN is null."""
    typer.echo(json.dumps(strict(content), indent=1))


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
    screen = Console(stderr=True)
    if not screen.is_terminal:  # rich before 14.3 prints an empty line for a disabled bar
        yield lambda amount=1, title=None: None
        return
    with Progress(*columns, console=screen, transient=True) as progress:
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
    except (TrajectoryError, IngestError, ValueError, OSError, ImportError) as error:
        said = " ".join(str(error).split())
        notes.print("error:", said, style=None, highlight=False, markup=False)
        raise typer.Exit(1) from None
