"""`relex-verl`: look into a trajectory, give back an observed checkpoint, predict a later one. No GPU, no verl, no Ray."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from relex_verl import tracking
from relex_verl.diagnostics import describe, random_walk_gram, summary
from relex_verl.extrapolators import METHODS
from relex_verl.gram import delta_gram
from relex_verl.observer import Prediction, extrapolate, write_checkpoint
from relex_verl.trajectory import Trajectory, TrajectoryError, step_ranges

app = typer.Typer(
    help="Look into the trajectory that RELEX recorded of a GRPO run, and predict checkpoints from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

TrajectoryFolder = Annotated[
    Path, typer.Argument(metavar="TRAJECTORY", help="Folder with index.json: output_dir/trajectory")
]
OutFolder = Annotated[Path, typer.Option("--out", help="Where to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def info(trajectory: TrajectoryFolder, as_json: AsJson = False) -> None:
    """Show what a trajectory holds and how straight it is, beside what a pure random walk would show."""
    with _clear_errors():
        opened = Trajectory(trajectory)
        steps = opened.steps_until(None)
        gram_LTT = delta_gram(opened.increment_gram())
        figures = {name: summary(values) for name, values in describe(gram_LTT, steps).items()}
        null = {name: values.item() for name, values in describe(random_walk_gram(steps), steps).items()}
        size = sum(path.stat().st_size for path in trajectory.rglob("*") if path.is_file())
    facts: dict[str, Any] = {
        "base model": opened.index.base_model,
        "trajectory": opened.index.encoding,
        "observed steps": step_ranges(steps),
        "ranks": opened.index.world_size,
        "tensors": len(opened.names),
        "bytes": size,
        "run": opened.index.run,
    }
    if as_json:
        console.print_json(json.dumps({**facts, "steps": steps, "figures": figures, "random_walk": null}))
        return
    for key, value in facts.items():
        console.print(f"[bold]{key}[/]: {value}", highlight=False)
    console.print(_figures_table(figures, null))


@app.command()
def checkout(
    trajectory: TrajectoryFolder,
    step: Annotated[int, typer.Option(help="An observed step, or 0 for the origin.")],
    out: OutFolder,
) -> None:
    """Give back the Hugging Face checkpoint of an observed step.

    From a bf16 trajectory: bit for bit as verl held it. From an fp32 trajectory: the float32 reconstruction, with the
    bound of its error printed.
    """
    with _clear_errors():
        opened = Trajectory(trajectory)
        error = opened.error_bound(step)
        provenance = {
            "base_model": opened.index.base_model,
            "step": step,
            "max_error": error,
            "trajectory": str(trajectory),
        }
        with _progress(opened, f"step {step}") as advance:
            write_checkpoint(opened, opened.states(step), out, provenance, opened.encoding.dtype, advance)
    exact = "bit for bit" if error == 0 else f"float32, each weight within {error:.1e}"
    console.print(f"step {step} ({exact}): {out}", highlight=False)


@app.command(name="extrapolate")
def extrapolate_command(
    trajectory: TrajectoryFolder,
    t_cut: Annotated[int, typer.Option(help="Fit on the observed steps up to this one.")],
    target: Annotated[str, typer.Option(help="Steps to predict, separated by commas.")],
    out: OutFolder,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "relex",
    rank: Annotated[int, typer.Option(min=1, help="Directions kept for each tensor.")] = 1,
    fit_from: Annotated[int, typer.Option(min=0, help="First step that takes part in the fit.")] = 1,
) -> None:
    """Predict checkpoints from the steps up to a cut, from the trajectory alone: OUT/<method>-step_<N>/."""
    with _clear_errors():
        opened = Trajectory(trajectory)
        steps = opened.steps_until(t_cut)
        if method not in METHODS:
            raise ValueError(f"--method {method}: give one of {', '.join(METHODS)}")
        for step in _steps(target, t_cut):
            prediction = Prediction(method, step, rank, fit_from)
            provenance = tracking.provenance(opened.index.base_model, prediction, t_cut, steps, trajectory)
            folder = out / prediction.folder_name
            out.mkdir(parents=True, exist_ok=True)
            with _progress(opened, prediction.folder_name) as advance:
                shards = extrapolate(opened, t_cut, prediction)
                write_checkpoint(opened, shards, folder, provenance, progress=advance)
            console.print(f"{prediction.folder_name}: {folder}", highlight=False)


def _steps(targets: str, t_cut: int) -> list[int]:
    try:
        steps = [int(target) for target in targets.split(",")]
    except ValueError:
        raise ValueError(f"--target {targets}: give whole step numbers separated by commas") from None
    early = [step for step in steps if step <= t_cut]
    if early:
        raise ValueError(f"--target {early[0]} is not after --t-cut {t_cut}")
    return steps


def _figures_table(figures: dict[str, dict[str, float]], null: dict[str, float]) -> Table:
    table = Table(title="over the tensors")
    for column in ("", "mean", "p10", "min", "random walk"):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in figures.items():
        cells = [f"{values[key]:.3f}" if values else "-" for key in ("mean", "p10", "min")]
        table.add_row(name.replace("_", " "), *cells, f"{null[name]:.3f}")
    return table


@contextmanager
def _progress(trajectory: Trajectory, title: str) -> Iterator[Any]:
    """A bar over the elements of all tensors; yields the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=trajectory.elements)
        yield lambda elements: progress.advance(task, elements)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user can mend is said in one line; anything else is ours and keeps its traceback."""
    try:
        yield
    except (TrajectoryError, ValueError, FileNotFoundError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
