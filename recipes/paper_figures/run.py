"""The training run: verl's own trainer in the quickstart's task, recorded whole, with its own validations."""

import subprocess
import sys
from pathlib import Path

import training
from data import write
from schedule import Schedule

from paper_figures.design import Design

SAVED = 5  # checkpoints of verl's, to go on from; not for their weights


def trajectory_of(out: Path) -> Path:
    """Every step of the run."""
    return out / "run" / "relex" / "trajectory"


def command(design: Design, base: Path, out: Path, data: tuple[Path, Path]) -> list[str]:
    """verl's command line: the quickstart's, and RELEX does nothing but record."""
    folder = out / "run"
    schedule = Schedule(design.steps, design.aligned_cut, (2 * design.steps,), full=True)
    of_relex = ("+relex=", "relex.")
    options = training.overrides(schedule, base, data, folder, 1, "fsdp")
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        *(option for option in options if not option.startswith(of_relex)),
        "trainer.logger=[console,file]",
        "trainer.resume_mode=auto",
        f"trainer.test_freq={design.validate_every}",
        f"trainer.save_freq={max(1, design.steps // SAVED)}",
        "+relex=default",
        f"relex.output_dir={folder / 'relex'}",
        "relex.trajectory=bf16",
        "relex.record=run",
        "relex.t_cut=null",
        "relex.keep_best=true",
    ]


def train(design: Design, base: Path, out: Path) -> None:
    """verl's trainer, from the start or from its last checkpoint; a run that is done is not begun again.

    Raises:
        RuntimeError: it failed.
    """
    folder = out / "run"
    done = folder / "done"
    if done.exists():
        return
    data = write(folder / "data")
    with (folder / "log.txt").open("a") as log:
        made = command(design, base, out, data)
        ended = subprocess.run(made, cwd=folder, env=training.environment(folder), stdout=log, stderr=log, check=False)
    last = max(dict(training.read_metrics(folder)), default=0)
    if ended.returncode or last < design.steps:
        raise RuntimeError(f"verl's trainer ended with {ended.returncode} after step {last}: see {folder / 'log.txt'}")
    done.touch()
