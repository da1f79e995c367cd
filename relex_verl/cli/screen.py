"""What the commands show: JSON, tables, bars, and errors in one line."""

import errno
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from relex_verl.cli.signals import TERMINATED
from relex_verl.offline.ingest import IngestError
from relex_verl.reporting.records import strict
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import Trajectory

__all__ = ["clear_errors", "console", "element_bar", "notes", "print_fact", "print_json", "step_bar", "table_of"]

GO_ON = "what is complete is kept, nothing half-written stays; run the same command again to go on"
# Into a file or a pipe, rich would assume 80 columns and cut names.
# No markup: what is shown are paths and names, and one in brackets would be taken for a style.
PLAIN: dict[str, Any] = {"markup": False, "emoji": False}
console = Console(width=None if sys.stdout.isatty() else 1000, **PLAIN)
notes = Console(stderr=True, soft_wrap=True, **PLAIN)  # what is no result: standard output may be JSON


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
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True, **PLAIN)
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


def print_fact(key: str, value: Any) -> None:
    """A line of what a command has found out."""
    console.print(Text.assemble((key, "bold"), f": {value}"), highlight=False)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can mend is said in one line; anything else is ours and keeps its traceback."""
    try:
        yield
    except (TrajectoryError, IngestError, ValueError, OSError, ImportError) as error:
        said = _in_words(error) if isinstance(error, OSError) and error.strerror else str(error)
        notes.print("error:", " ".join(said.split()), style=None, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        kept = next((one for one in interrupt.args if one != TERMINATED), GO_ON)
        notes.print("interrupted:", kept, style=None, highlight=False)
        raise typer.Exit(143 if TERMINATED in interrupt.args else 130) from None


def _in_words(error: OSError) -> str:
    """An error of the system as a sentence, without its number."""
    place = f"{error.filename}: " if error.filename is not None else ""
    cure = {
        errno.ENOSPC: ": make room there, or give another --out",
        errno.EDQUOT: ": make room there, or give another --out",
        errno.EFBIG: ": no file may be so large there (ulimit -f), give another --out",
        errno.EACCES: ": this user may not read or write it, chmod it or give another place",
        errno.EROFS: ": give another place",
        errno.ENOTDIR: ": a part of it is a file, give a folder",
        errno.EEXIST: ": give a folder that is none yet",
    }
    return f"{place}{error.strerror}{cure.get(error.errno or 0, '')}"
