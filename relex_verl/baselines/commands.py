"""`relex-verl baseline ...`: the systems of the paper that are no mere weight vector, from a trajectory to checkpoints."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from relex_verl.baselines.alpharl import alpharl
from relex_verl.baselines.coefficient_transformer import TransformerSettings, transformer_tensors
from relex_verl.baselines.next_extrapolation import NextSettings, fit_next, next_tensors
from relex_verl.baselines.weight_extrapolation import weight_extrapolation
from relex_verl.prediction import write_checkpoint
from relex_verl.shards import TensorShard
from relex_verl.tracking import versions
from relex_verl.trajectory import Trajectory, TrajectoryError

__all__ = ["baseline_app"]

baseline_app = typer.Typer(
    help="The systems that the paper compares RELEX with, as checkpoints of your own trajectory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

TrajectoryFolder = Annotated[
    Path, typer.Argument(metavar="TRAJECTORY", help="Folder with index.json: output_dir/trajectory")
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder that gets one folder a checkpoint.")]
Cut = Annotated[int, typer.Option(help="Use the observed steps up to this one.")]
Targets = Annotated[str, typer.Option(help="Steps to predict, separated by commas.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights.")]


class AddTo(str, Enum):
    """Where AlphaRL's update goes."""

    base = "base"
    last = "last"


@baseline_app.command(name="weight-extrapolation")
def weight_extrapolation_command(
    trajectory: TrajectoryFolder,
    t_cut: Cut,
    target: Targets,
    out: OutFolder,
    first: Annotated[int | None, typer.Option(help="Step of the first checkpoint; the origin if not given.")] = None,
    copy_norms: Annotated[
        bool, typer.Option(help="Copy norm layers from the last checkpoint, as its authors do.")
    ] = True,
) -> None:
    """Weight Extrapolation (arXiv 2601.04537): a line through two checkpoints."""
    with _clear_errors():
        opened = Trajectory(trajectory)
        for step in _later_steps(target, t_cut):
            shards = weight_extrapolation(opened, t_cut, step, first, copy_norms)
            settings = {"first": first, "copy_norms": copy_norms}
            _write(opened, shards, out, "weight-extrapolation", f"step_{step}", t_cut, target=step, **settings)


@baseline_app.command(name="transformer")
def transformer_command(
    trajectory: TrajectoryFolder,
    t_cut: Cut,
    target: Targets,
    out: OutFolder,
    epochs: Annotated[int, typer.Option(min=0, help="Of full-batch training.")] = TransformerSettings.epochs,
    seed: Seed = 0,
) -> None:
    """The paper's 3-layer Transformer on the rank-1 coefficients (arXiv 2605.21468, Table 2)."""
    with _clear_errors():
        opened = Trajectory(trajectory)
        settings = TransformerSettings(epochs=epochs, seed=seed)
        for step in _later_steps(target, t_cut):
            shards = transformer_tensors(opened, t_cut, step, settings)
            _write(opened, shards, out, "transformer", f"step_{step}", t_cut, target=step, epochs=epochs, seed=seed)


@baseline_app.command(name="alpharl")
def alpharl_command(
    trajectory: TrajectoryFolder,
    t_cut: Cut,
    scores: Annotated[Path, typer.Option(help='JSON file with the score of each observed step: {"10": 0.41, ...}.')],
    wanted: Annotated[str, typer.Option(help="Scores to aim at, separated by commas.")],
    out: OutFolder,
    add_to: Annotated[AddTo, typer.Option(help="base as in the paper, last as in the authors' code.")] = AddTo.base,
) -> None:
    """AlphaRL (arXiv 2510.00553): partial least squares between top singular vectors and scores."""
    with _clear_errors():
        opened = Trajectory(trajectory)
        by_step = _scores(scores)
        for score in _numbers(wanted, float, "--wanted"):
            where = add_to.value
            shards = alpharl(opened, t_cut, by_step, score, "base" if where == "base" else "last")
            settings = {"scores": by_step, "wanted": score, "add_to": where}
            _write(opened, shards, out, "alpharl", f"score_{score:g}", t_cut, target=None, **settings)


@baseline_app.command(name="next")
def next_command(
    trajectory: TrajectoryFolder,
    t_cut: Cut,
    out: OutFolder,
    coefficient: Annotated[
        str, typer.Option(help="Multiples of the look-ahead, separated by commas; its authors try 0.5 to 4.")
    ] = "1",
    interval: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = NextSettings.interval,
    look_ahead: Annotated[
        int, typer.Option(min=1, help="Steps that are learned to be predicted.")
    ] = NextSettings.look_ahead,
    epochs: Annotated[int, typer.Option(min=0, help="Of full-batch training.")] = NextSettings.epochs,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = NextSettings.learning_rate,
    seed: Seed = 0,
) -> None:
    """NExt (arXiv 2604.11446): networks on the rank-1 factors of past changes predict those of the next one."""
    with _clear_errors():
        opened = Trajectory(trajectory)
        chosen = _numbers(coefficient, float, "--coefficient")
        settings = NextSettings(interval, look_ahead, epochs=epochs, learning_rate=learning_rate, seed=seed)
        fit = fit_next(opened, t_cut, settings)
        console.print(f"mean absolute error {fit.first_loss:.4g} before, {fit.last_loss:.4g} after training")
        for multiple in chosen:
            step = round(fit.last + multiple * look_ahead)
            shards = next_tensors(opened, fit, multiple)
            _write(
                opened, shards, out, "next", f"step_{step}", t_cut, target=step, coefficient=multiple, **vars(settings)
            )


def _write(
    trajectory: Trajectory,
    shards: Iterable[TensorShard],
    out: Path,
    method: str,
    suffix: str,
    cut: int,
    target: int | None,
    **settings: Any,
) -> None:
    """OUT/<method>-<suffix>/ with relex.json (DESIGN: its keys, and `settings`)."""
    provenance = {
        "base_model": trajectory.index.base_model,
        "method": method,
        "rank": 1,
        "t_cut": cut,
        "target": target,
        "observed_steps": trajectory.steps_until(cut),
        "trajectory": str(trajectory.folder),
        "settings": settings,
        "versions": versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    folder = write_checkpoint(trajectory, shards, out / f"{method}-{suffix}", provenance)
    console.print(f"{folder.name}: {folder}", highlight=False)


def _numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give numbers separated by commas") from None


def _later_steps(targets: str, t_cut: int) -> list[int]:
    steps = _numbers(targets, int, "--target")
    early = [step for step in steps if step <= t_cut]
    if early:
        raise ValueError(f"--target {early[0]} is not after --t-cut {t_cut}")
    return steps


def _scores(path: Path) -> dict[int, float]:
    try:
        return {int(step): float(score) for step, score in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'{path} has to be a JSON object step -> score, such as {{"10": 0.41}}: {error}') from error


@contextmanager
def _clear_errors() -> Iterator[None]:
    """What a user can mend is said in one line; anything else is ours and keeps its traceback."""
    try:
        yield
    except (TrajectoryError, ValueError, FileNotFoundError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
