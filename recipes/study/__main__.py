"""`python -m study`: train and record every run, then predict, score and report. See run.sh."""

import argparse
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import transformers
from rich.console import Console

from study import jumping, three_digit, through_verl
from study.agreement import compare_with_verl
from study.grid import FULL, QUICK, Grid, Run
from study.jump_report import jump_tables
from study.quantization import quantization_run
from study.report import PAGE, fill, write_report
from study.score import planned_scores, score_run
from study.sketches import sketch_run
from study.task import load_model
from study.train import planned_steps, train_run
from study.workers import for_every_run


def arguments_of() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(prog="recipes/study/run.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache", help="working folder")
    parser.add_argument("--quick", action="store_true", help="a tiny grid, to see that everything runs (minutes)")
    parser.add_argument("--jump", action="store_true", help="the study of jumps: what RESULTS.md says under Jumps")
    parser.add_argument(
        "--task", choices=list(jumping.TASKS), default="two-digit", help="with --jump: of the plain loop"
    )
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="with --jump: runs of such names, `*seed1-plain` say")
    parser.add_argument("--steps", type=int, help="with --jump: training steps of each run of the plain loop")
    parser.add_argument("--keep", action="store_true", help="keep the recorded trajectories after they were scored")
    parser.add_argument("--publish", action="store_true", help="copy the results beside RESULTS.md, fill in its tables")
    parser.add_argument(
        "--phase",
        choices=["train", "report", "all"],
        default="all",
        help="train: stop after training; report, with --jump: only the tables of what is done",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the planned runs and leave")
    return parser.parse_args()


def main() -> None:
    """Go through the phases; each skips what is there already."""
    arguments = arguments_of()
    transformers.utils.logging.disable_progress_bar()
    grid, out = (QUICK, arguments.out / "quick") if arguments.quick else (FULL, arguments.out / "full")
    if arguments.jump:
        jumps(arguments)
        return
    if arguments.dry_run:
        print(*planned(grid, out), sep="\n")
        return
    base = arguments.out.absolute() / "base"
    load_model(base)  # builds it
    for_every_run("train and record", train_run, grid.runs(), (grid, base, out), planned_steps(grid))
    if arguments.phase == "all":
        analyse(grid, base, out, PAGE if arguments.publish else None)
        if not arguments.keep:
            for run in grid.runs():
                forget(out, run)


def jumps(arguments: argparse.Namespace) -> None:
    """The plain loop's arms, then verl's own trainer; with --quick a few steps of each arm, and no trainer."""
    grid = replace(jumping.QUICK if arguments.quick else jumping.FULL, task=arguments.task)
    grid = replace(grid, steps=arguments.steps or grid.steps)
    out = arguments.out.absolute() / ("jump-quick" if arguments.quick else "jump")
    suffix = "" if grid.task == "two-digit" else f"-{grid.task}"
    loop, base = out / f"loop{suffix}", arguments.out.absolute() / f"base{suffix}"
    runs = [run for run in grid.runs() if chosen(run.name, arguments.only)]
    through = [run for run in through_verl.queue() if chosen(run.name, arguments.only)]
    queue = through if grid.task == "two-digit" and not arguments.quick and arguments.phase == "all" else []
    if arguments.dry_run:
        print(*(f"{run.name}: {grid.steps} training steps -> {loop / run.name}" for run in runs), sep="\n")
        print(*(f"{run.name}: {run.steps} steps of verl -> {out / 'verl' / run.name}" for run in queue), sep="\n")
        return
    if arguments.phase != "report":
        load_model(start := arguments.out.absolute() / "base")  # builds it
        if grid.task == "three-digit":
            three_digit.build(base, start)
        for_every_run("train", jumping.jump_run, runs, (grid, base, loop), grid.steps)
        through_verl.run_queue(queue, base, out / "verl")
    tables = jump_tables(out, PAGE.parent / "results" if arguments.publish else out / "results")
    if arguments.publish:
        fill(PAGE, tables)
    for name, table in tables.items():
        Console().print(f"{name}\n{table}", highlight=False)


def chosen(name: str, only: list[str] | None) -> bool:
    """Whether a run is asked for."""
    return only is None or any(fnmatch(name, one) for one in only)


def planned(grid: Grid, out: Path) -> list[str]:
    """A line for each run: what it trains, records and scores, and where it goes."""
    lines = []
    for run in grid.runs():
        trajectories = {name for arm in grid.arms(run) for name in grid.rows(arm)}
        trained = f"{planned_steps(grid)} training steps with controls, {len(trajectories)} trajectories"
        lines.append(
            f"{run.name}: learning rate {run.learning_rate:g}, seed {run.seed}, {trained}, {planned_scores(grid)} scores "
            f"-> {out / run.name}"
        )
    return lines


def analyse(grid: Grid, base: Path, out: Path, page: Path | None) -> None:
    """Everything after training."""
    for_every_run("predict and score", score_run, grid.runs(), (grid, base, out), planned_scores(grid))
    yardsticks = [run for run in grid.runs() if grid.is_yardstick(run)]
    for_every_run("quantisation error", quantization_run, yardsticks, (grid, out), 1)
    for_every_run("error of the sketch", sketch_run, yardsticks, (grid, out), 1)
    with Console().status("verl's own trainer, for comparison (minutes)"):
        compare_with_verl(grid, base, out)
    Console().print(f"results: {write_report(grid, out, page)}")


def forget(out: Path, run: Run) -> None:
    """Delete a scored run's trajectories and weights."""
    for name in ("trajectories", "weights"):
        shutil.rmtree(out / run.name / name, ignore_errors=True)
    (out / run.name / "states.safetensors").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
