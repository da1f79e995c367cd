"""`relex-verl`: record finished runs, look into trajectories, predict checkpoints. No GPU, no verl, no Ray.

Commands stand in files by topic; each is a thin face of a function below `cli`.
"""

import relex_verl.cli.environment  # noqa: F401  # before torch is loaded

# isort: split
from typing import Annotated

import typer

from relex_verl import __version__
from relex_verl.cli import ingest, planning, push, stored, studies
from relex_verl.cli.baselines import baseline_app

__all__ = ["app"]

app = typer.Typer(
    help="Look into the trajectory that RELEX recorded of a GRPO run, and predict checkpoints from it. "
    "A run that is already finished becomes a trajectory with `relex-verl ingest`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"relex-verl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


app.command()(ingest.ingest)
app.command()(stored.info)
app.command()(stored.checkout)
app.command()(stored.extrapolate)
app.command()(stored.reconstruct)
app.command()(studies.diagnose)
app.command()(studies.compare)
app.command()(studies.backtest)
app.command()(studies.sweep)
app.command()(planning.plan)
app.command()(push.push)
app.add_typer(baseline_app, name="baseline")
