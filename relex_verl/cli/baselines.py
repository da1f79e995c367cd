"""`relex-verl baseline ...`: the systems of the paper that are no mere weight vector, from a trajectory to checkpoints."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from relex_verl.cli.arguments import AsJson, BaseNow, OutFolder, TrajectoryFolder, WindowNumber, later_steps_of
from relex_verl.cli.screen import clear_errors, console, element_bar, notes, print_json
from relex_verl.offline.analysis import observed_until, write_prediction
from relex_verl.offline.baselines.alpharl import alpharl
from relex_verl.offline.baselines.coefficient_transformer import TransformerSettings, transformer_tensors
from relex_verl.offline.baselines.next_extrapolation import NextSettings, fit_next, next_tensors
from relex_verl.offline.baselines.weight_extrapolation import weight_extrapolation
from relex_verl.reporting.provenance import Provenance
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["baseline_app"]

baseline_app = typer.Typer(
    help="The systems that the paper compares RELEX with, as checkpoints of your own trajectory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Cut = Annotated[int, typer.Option(help="Use the observed steps up to this one.")]
Targets = Annotated[str, typer.Option(help="Steps to predict, separated by commas; 200,...,1000 is every 100 steps.")]
Seed = Annotated[int, typer.Option(help="Of the initial weights.")]


class AddTo(str, Enum):
    """Where AlphaRL's update goes."""

    base = "base"
    last = "last"


@dataclass
class _Predictions:
    """Those that one command writes: OUT/<method>-<suffix>/ with relex.json and its `settings`."""

    trajectory: Trajectory
    cut: int
    out: Path
    as_json: bool
    written: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trajectory.row_codec()  # before anything is trained: a sketch has no single steps
        self.steps = observed_until(self.trajectory, self.cut)

    def write(
        self, method: str, suffix: str, target: int | None, shards: Iterable[TensorShard], settings: dict[str, Any]
    ) -> None:
        """One of them, with a bar."""
        base_model, place = self.trajectory.index.base_model, self.trajectory.folder.resolve()
        of = (method, target, settings, base_model, self.cut, self.steps, place, self.trajectory.number)
        facts = Provenance.of_baseline(*of)
        name = f"{method}-{suffix}"
        with element_bar(self.trajectory, name) as advance:
            write_prediction(self.trajectory, shards, self.out / name, facts, advance)
        row = {"path": str(self.out / name), "method": method, "t_cut": self.cut}
        self.written.append({**row, "target": target, "settings": settings})
        if not self.as_json:
            console.print(f"{name}: {self.out / name}", highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Print what was written, where JSON is wanted."""
        if self.as_json:
            print_json({"predictions": self.written})


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
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Weight Extrapolation (arXiv 2601.04537): a line through two checkpoints."""
    with clear_errors():
        predictions = _Predictions(Trajectory(trajectory, window, base), t_cut, out, as_json)
        settings = {"first": first, "copy_norms": copy_norms}
        for step in later_steps_of(target, t_cut):
            shards = weight_extrapolation(predictions.trajectory, t_cut, step, first, copy_norms)
            predictions.write("weight-extrapolation", f"step_{step}", step, shards, settings)
    predictions.finish()


@baseline_app.command(name="transformer")
def transformer_command(
    trajectory: TrajectoryFolder,
    t_cut: Cut,
    target: Targets,
    out: OutFolder,
    epochs: Annotated[int, typer.Option(min=0, help="Of full-batch training.")] = TransformerSettings.epochs,
    seed: Seed = 0,
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """The paper's 3-layer Transformer on the rank-1 coefficients (arXiv 2605.21468, Table 2)."""
    with clear_errors():
        predictions = _Predictions(Trajectory(trajectory, window, base), t_cut, out, as_json)
        settings = TransformerSettings(epochs=epochs, seed=seed)
        for step in later_steps_of(target, t_cut):
            shards = transformer_tensors(predictions.trajectory, t_cut, step, settings)
            predictions.write("transformer", f"step_{step}", step, shards, {"epochs": epochs, "seed": seed})
    predictions.finish()


@baseline_app.command(name="alpharl")
def alpharl_command(
    trajectory: TrajectoryFolder,
    t_cut: Cut,
    scores: Annotated[Path, typer.Option(help='JSON file with the score of each observed step: {"10": 0.41, ...}.')],
    wanted: Annotated[str, typer.Option(help="Scores to aim at, separated by commas.")],
    out: OutFolder,
    add_to: Annotated[AddTo, typer.Option(help="base as in the paper, last as in the authors' code.")] = AddTo.base,
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """AlphaRL (arXiv 2510.00553): partial least squares between top singular vectors and scores."""
    with clear_errors():
        predictions = _Predictions(Trajectory(trajectory, window, base), t_cut, out, as_json)
        by_step = _scores(scores)
        for score in _numbers(wanted, "--wanted"):
            where = add_to.value
            shards = alpharl(predictions.trajectory, t_cut, by_step, score, "base" if where == "base" else "last")
            settings = {"scores": by_step, "wanted": score, "add_to": where}
            predictions.write("alpharl", f"score_{score:g}", None, shards, settings)
    predictions.finish()


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
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """NExt (arXiv 2604.11446): networks on the rank-1 factors of past changes predict those of the next one."""
    with clear_errors():
        predictions = _Predictions(Trajectory(trajectory, window, base), t_cut, out, as_json)
        chosen = _numbers(coefficient, "--coefficient")
        settings = NextSettings(interval, look_ahead, epochs=epochs, learning_rate=learning_rate, seed=seed)
        fit = fit_next(predictions.trajectory, t_cut, settings)
        notes.print(f"mean absolute error {fit.first_loss:.4g} before, {fit.last_loss:.4g} after training")
        for multiple in chosen:
            step = round(fit.last + multiple * look_ahead)
            shards = next_tensors(predictions.trajectory, fit, multiple)
            predictions.write("next", f"step_{step}", step, shards, {"coefficient": multiple, **vars(settings)})
    predictions.finish()


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: give numbers separated by commas") from None


def _scores(path: Path) -> dict[int, float]:
    try:
        return {int(step): float(score) for step, score in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'{path} has to be a JSON object step -> score, such as {{"10": 0.41}}: {error}') from error
