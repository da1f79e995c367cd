"""`relex-verl`: record finished runs, look into trajectories, predict checkpoints. No GPU, no verl, no Ray.

Commands stand in files by topic; each is a thin face of a function below `cli`. A file, and torch with it, is loaded when
its command is called: `--help` lists them without.
"""

import relex_verl.cli.environment  # noqa: F401  # before torch is loaded

# isort: split
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from relex_verl import __version__

__all__ = ["COMMANDS", "app"]

# Name -> file, and the first line of its help.
COMMANDS = {
    "ingest": ("ingest", "Record the checkpoints of a finished run as a trajectory, in one pass."),
    "info": (
        "stored",
        "Show what a trajectory holds and how straight it is, beside what a pure random walk would show.",
    ),
    "verify": (
        "verifying",
        "Read every file of a trajectory and compare it with its checksum; exit status 1 where one is damaged.",
    ),
    "checkout": ("stored", "Give back the Hugging Face checkpoint of an observed step, of whatever window."),
    "extrapolate": (
        "stored",
        "Predict checkpoints from the steps up to a cut, from the trajectory alone: OUT/<method>-step_<N>/.",
    ),
    "reconstruct": ("stored", "Rank-r reconstruction of an observed checkpoint (Algorithm 1 of the paper)."),
    "diagnose": (
        "studies",
        "How low-rank and how straight each tensor's path is (the paper's Findings 1 and 2, Figures 4 and 5).",
    ),
    "compare": (
        "studies",
        "Predictions against the true later weights: cosine and norm ratio of the deltas (Figure 6, Appendix B).",
    ),
    "backtest": (
        "studies",
        "Predict the last observed row from each prefix, and compare with simply keeping the prefix's last checkpoint.",
    ),
    "sweep": (
        "studies",
        "Write a grid of predictions (the paper's Table 3) and OUT/manifest.json, which an evaluator can walk.",
    ),
    "plan": (
        "planning",
        "Memory, disk and time of following a run, from its size alone; with --memory-gib, whether it would be admitted.",
    ),
    "push": (
        "push",
        "Upload a predicted checkpoint, with a model card that says how it was made, from what, and how it scored.",
    ),
    "baseline": ("baselines", "The systems that the paper compares RELEX with, as checkpoints of your own trajectory."),
}


class _LoadedWhenCalled(TyperGroup):
    """The commands, each loaded with its file when it is called."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        file, summary = COMMANDS[cmd_name]
        if self.listing:
            return TyperCommand(cmd_name, help=summary)
        module = import_module(f"relex_verl.cli.{file}")
        if cmd_name == "baseline":
            return get_command(module.baseline_app)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(cmd_name)(getattr(module, cmd_name))
        return get_command(alone)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False


app = typer.Typer(
    cls=_LoadedWhenCalled,
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
