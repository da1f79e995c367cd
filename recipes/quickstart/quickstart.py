"""A real GRPO run of verl's own trainer with RELEX on, for a machine without an accelerator.

Builds a small base model (a Qwen2 of 1.15M parameters that adds two-digit numbers right about 60% of the time), trains it
with verl up to the cut, lets RELEX predict later checkpoints, and scores all of them.
"""

import json
import os
import re
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import data
import results
import training
import typer
from progress import Phase, PhaseFailed, phase, run_logged
from rich.console import Console
from rich.markup import escape
from schedule import DEFAULT_STEPS, Schedule, resolve

RECIPE = Path(__file__).resolve().parent
ROOT = RECIPE.parents[1]
BASE_MODEL = RECIPE / ".cache" / "base"
BASE_MODEL_LINE = re.compile(r"step (\d+): accuracy ([\d.]+)")

app = typer.Typer(add_completion=False, rich_markup_mode="rich")
console = Console(width=None if sys.stdout.isatty() else 160)


@app.command(
    help=__doc__,
    epilog="Example: bash recipes/quickstart/run.sh --full --ranks 2 -- actor_rollout_ref.actor.optim.lr=1e-6",
)
def main(
    steps: Annotated[int, typer.Option(help="Length of the whole run, in training steps.", min=2)] = DEFAULT_STEPS,
    t_cut: Annotated[
        float | None, typer.Option(help="Step (or share of all steps, below 1) to cut at. (15% of the steps)")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Steps (or shares) to predict, with commas. (30%, 50%, 75% and 100% of the steps)"),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Training processes.", min=1, max=2)] = 1,
    strategy: Annotated[str, typer.Option(help="fsdp or fsdp2.")] = "fsdp",
    rollout: Annotated[
        str,
        typer.Option(help="cpu, a small one of the recipe's own, or vllm: verl's own, in an environment of its own."),
    ] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="Train on after the cut, to compare.")] = False,
    jump: Annotated[
        bool,
        typer.Option("--jump", help="Set the weights to the best prediction at every cut (10% of the steps apart)."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for everything the run writes. (outputs/quickstart-TIME)")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print verl's command and leave.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="After --: Hydra overrides for verl, for example relex.rank=2.")
    ] = None,
) -> None:
    """Check the arguments, then run phase by phase."""
    extra = overrides or []
    try:
        schedule = resolve(steps, t_cut, targets, full, jump)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if strategy not in ("fsdp", "fsdp2"):
        raise typer.BadParameter(f"--strategy {strategy}: give fsdp or fsdp2")
    if rollout not in training.ROLLOUTS:
        raise typer.BadParameter(f"--rollout {rollout}: give {' or '.join(training.ROLLOUTS)}")
    out = (out or ROOT / "outputs" / f"quickstart-{datetime.now():%Y%m%d-%H%M%S}").absolute()
    resuming = any(text.lstrip("+").startswith("trainer.resume_mode=") for text in extra)
    if training.metrics_file(out).exists() and not resuming:
        raise typer.BadParameter(f"--out {out} holds another run: give another folder, or delete that one")
    command = [sys.executable, "-m", "verl.trainer.main_ppo"]
    command += training.overrides(schedule, BASE_MODEL, data.files(out / "data"), out, ranks, strategy, rollout) + extra
    environment = training.environment(out, rollout)
    if dry_run:
        typer.echo(_for_a_shell(command, environment))
        return
    try:
        _run(command, environment, schedule, out)
    except PhaseFailed as failure:
        console.print(escape(failure.tail()), highlight=False)
        console.print(f"[red]{failure}[/red]; all of it: {failure.log}", highlight=False)
        raise typer.Exit(1) from None


def _for_a_shell(command: list[str], environment: dict[str, str]) -> str:
    """The command with what it needs of the environment, to be typed into this shell."""
    words = ["env"]
    words += [word for name in os.environ if name not in environment for word in ("-u", name)]
    words += [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    return shlex.join(words + command)


def _run(command: list[str], environment: dict[str, str], schedule: Schedule, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    what = f"predicting {', '.join(map(str, schedule.targets))}"
    if schedule.jump:
        what = "jumping to what wins there, and again after as many steps"
    console.print(f"Training {schedule.trained} of {schedule.steps} steps; cut at {schedule.cut}; {what}.")
    console.print(f"What the frameworks print goes to {out / 'logs'}", highlight=False)
    _build_base_model(out)
    _, validation_file = data.write(out / "data")
    _train(command, environment, schedule, out)
    _report(schedule, out, validation_file)


def _build_base_model(out: Path) -> None:
    if BASE_MODEL.exists():
        console.print(f"Base model: {BASE_MODEL} (built before)", highlight=False)
        return
    log = out / "logs" / "base_model.log"
    with phase(console, "Pre-training the base model") as current:

        def show() -> None:
            lines = BASE_MODEL_LINE.findall(log.read_text(errors="replace"))
            if lines:
                current.show(f"step {lines[-1][0]}, accuracy {lines[-1][1]}")

        command = [sys.executable, str(RECIPE / "base_model.py"), str(BASE_MODEL)]
        run_logged(command, log, training.environment(out), show)


def _train(command: list[str], environment: dict[str, str], schedule: Schedule, out: Path) -> None:
    with phase(console, "Training with verl") as current:
        log = out / "logs" / "training.log"
        run_logged(command, log, environment, lambda: _show_training(current, schedule, out))


def _show_training(current: Phase, schedule: Schedule, out: Path) -> None:
    logged = list(training.read_metrics(out))
    if not logged:
        current.show("starting verl and Ray (about a minute)")
        return
    step, metrics = logged[-1]
    validated = training.scores(out)
    parts = [f"step {step}/{schedule.trained}"]
    if training.REWARD_METRIC in metrics:
        parts.append(f"reward {metrics[training.REWARD_METRIC]:.2f}")
    if validated:
        parts.append(f"validation accuracy {list(validated.values())[-1]:.3f}")
    current.show(", ".join(parts), done=step, total=schedule.trained)


def _report(schedule: Schedule, out: Path, validation_file: Path) -> None:
    observed = results.Checkpoint("last observed", schedule.cut, out / "last_observed")
    if not (observed.folder / "config.json").exists():
        command = [str(Path(sys.executable).parent / "relex-verl"), "checkout", str(out / "relex" / "trajectory")]
        command += ["--step", str(schedule.cut), "--out", str(observed.folder)]
        with phase(console, "Checking out the last observed step"):
            run_logged(command, out / "logs" / "checkout.log", training.environment(out))
    base = results.Checkpoint("base", 0, BASE_MODEL)
    checkpoints = [base, observed, *results.predicted(out), *results.trained(out, schedule)]
    _score(checkpoints, validation_file, out)
    if schedule.jump:
        console.print(results.jumps(out))
    console.print(results.table(checkpoints, training.scores(out) if schedule.full else {}))
    best = max(checkpoints, key=lambda one: one.accuracy or 0.0)
    console.print(f"RELEX's report and advice: {out / 'relex' / 'report.json'}", highlight=False)
    console.print("Load a checkpoint, here the best one:\n", highlight=False)
    console.print("    from transformers import AutoModelForCausalLM", highlight=False)
    console.print(f'    model = AutoModelForCausalLM.from_pretrained("{best.folder}")', highlight=False)


def _score(checkpoints: list[results.Checkpoint], validation_file: Path, out: Path) -> None:
    log = out / "logs" / "evaluate.log"
    command = [sys.executable, str(RECIPE / "evaluate.py"), "--val", str(validation_file)]
    with phase(console, "Scoring the checkpoints") as current:

        def show() -> None:
            by_folder = {}
            for line in log.read_text(errors="replace").splitlines():
                if line.startswith('{"checkpoint"'):
                    scored = json.loads(line)
                    by_folder[scored["checkpoint"]] = scored["accuracy"]
            for one in checkpoints:
                one.accuracy = by_folder.get(str(one.folder))
            current.show(f"{len(by_folder)} of {len(checkpoints)}", done=len(by_folder), total=len(checkpoints))

        run_logged([*command, *(str(one.folder) for one in checkpoints)], log, training.environment(out), show)


if __name__ == "__main__":
    app(prog_name="bash recipes/quickstart/run.sh")
