"""What the commands share: options, the console, bars, tables, and errors in one line."""

import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from relex_verl import tracking
from relex_verl.budget import BudgetError
from relex_verl.extrapolators import METHODS
from relex_verl.ingest import Found, IngestError, find_checkpoints, find_revisions
from relex_verl.trajectory import Trajectory, TrajectoryError

__all__ = [
    "AllowPickle",
    "AsJson",
    "Checkpoints",
    "Cut",
    "FitFrom",
    "Hub",
    "OutFolder",
    "Rank",
    "Revisions",
    "TrajectoryFolder",
    "checkpoints_in",
    "clear_errors",
    "console",
    "element_bar",
    "later_steps_of",
    "methods_of",
    "notes",
    "print_json",
    "step_bar",
    "steps_of",
    "table_of",
    "tensors_of",
]

# Into a file or a pipe, rich would assume 80 columns and cut names.
console = Console(width=None if sys.stdout.isatty() else 1000)
notes = Console(stderr=True, soft_wrap=True)  # what is no result: standard output may be JSON

TrajectoryFolder = Annotated[
    Path,
    typer.Argument(metavar="TRAJECTORY", help="Folder with index.json: output_dir/trajectory, or what ingest wrote."),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Where to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Rank = Annotated[int, typer.Option(min=1, help="Directions kept for each tensor; the paper uses 1.")]
Cut = Annotated[int | None, typer.Option(help="Use the observed steps up to this one; all of them if not given.")]
FitFrom = Annotated[int, typer.Option(min=0, help="First step that takes part in the fit: leaves a warm-up out.")]
Checkpoints = Annotated[Path | None, typer.Option(help="Folder with global_step_5, step_5 or checkpoint-5 folders.")]
Hub = Annotated[str | None, typer.Option(help="Instead: a Hub repository whose revisions are steps.")]
Revisions = Annotated[str, typer.Option(help="How its revisions are named.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Use *.bin and verl's *.pt files (weights_only=True).")
]


def steps_of(text: str, option: str) -> list[int]:
    """Whole step numbers separated by commas; a range with `...` goes on as it began, or by 100: 200,400,...,1000.

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


def later_steps_of(text: str, cut: int) -> list[int]:
    """The steps of --target, all of them after the cut.

    Raises:
        ValueError: one that is not.
    """
    steps = steps_of(text, "--target")
    if steps[0] <= cut:
        raise ValueError(f"--target {steps[0]} is not after --t-cut {cut}: give later steps, or cut earlier")
    return steps


def checkpoints_in(checkpoints: Path | None, hub: str | None, revisions: str) -> tuple[list[Found], str]:
    """The checkpoints in a folder or a Hub repository, and what to call the place they are in.

    Raises:
        IngestError: both or none are given, or none is there.
    """
    if checkpoints is not None and hub is None:
        return find_checkpoints(checkpoints), str(checkpoints.resolve())
    if hub is not None and checkpoints is None:
        return find_revisions(hub, revisions), f"hub:{hub}"
    raise IngestError("give either --checkpoints FOLDER or --hub REPO")


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


def tensors_of(text: str, names: Sequence[str]) -> list[str]:
    """Tensors separated by commas, each by its name or a part that no other name has.

    Raises:
        ValueError: no tensor, or several, are called so.
    """
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        named = [part] if part in names else [name for name in names if part and part in name]
        if len(named) != 1:
            shown = ", ".join(named[:3] or difflib.get_close_matches(part, names, 3, 0.0))
            raise ValueError(f"--tensor {part}: {len(named) or 'no'} tensors are called so, e.g. {shown}")
        chosen += named
    return chosen


def print_json(content: Any) -> None:
    """JSON on standard output, without colour or wrapping; NaN is null."""
    typer.echo(json.dumps(tracking.strict(content), indent=1))


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
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
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
    except (TrajectoryError, IngestError, BudgetError, ValueError, OSError, ImportError) as error:
        said = " ".join(str(error).split())
        notes.print("error:", said, style=None, highlight=False, markup=False)
        raise typer.Exit(1) from None
