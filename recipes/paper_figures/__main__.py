"""`python -m paper_figures`: record a run whole, then predict, reconstruct, compare, score and draw. See run.sh."""

import argparse
from dataclasses import replace
from pathlib import Path

from base_model import build
from rich.console import Console

from paper_figures import analysis, report, run
from paper_figures.design import FULL, QUICK, Design

LEAST_STEPS = 20  # for four cuts that are not the same


def arguments_of() -> argparse.Namespace:
    """What the user asked for."""
    parser = argparse.ArgumentParser(prog="recipes/paper_figures/run.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / ".cache", help="working folder")
    parser.add_argument(
        "--steps", type=int, default=None, help=f"of the run ({FULL.steps}; {QUICK.steps} with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs (minutes)")
    parser.add_argument("--publish", action="store_true", help="copy the results beside README.md, fill in its table")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and leave")
    return parser.parse_args()


def main() -> None:
    """Go through the phases; each skips what is there already."""
    arguments = arguments_of()
    design, name = (QUICK, "quick") if arguments.quick else (FULL, "full")
    if arguments.steps is not None:
        if arguments.steps < LEAST_STEPS:
            raise SystemExit(f"--steps {arguments.steps}: give {LEAST_STEPS} or more")
        design = replace(design, steps=arguments.steps, validate_every=max(1, arguments.steps // 20))
    out = arguments.out.absolute() / name
    if arguments.dry_run:
        print(*planned(design, out), sep="\n")
        return
    base, say = arguments.out.absolute() / "base", Console()
    build(base)
    say.print(f"verl: {design.steps} steps, recorded whole; its log is {out / 'run' / 'log.txt'}", highlight=False)
    run.train(design, base, out)
    analysis.predict(design, out)
    folder, table = report.write(design, out, arguments.publish)
    say.print(table, highlight=False, soft_wrap=True)
    say.print(f"results: {folder}", highlight=False)


def planned(design: Design, out: Path) -> list[str]:
    """A line for each phase: what it does, and where that goes."""
    pairs = sum(target > cut for cut in design.cuts for target in design.targets)
    return [
        f"train: {design.steps} steps, a validation every {design.validate_every} -> {run.trajectory_of(out)}",
        f"sweep: cuts {design.cuts}, targets {design.targets}, {pairs} predictions -> {out / 'swept'}",
        f"reconstruct: steps {design.points} -> {out / 'reconstructed'}",
        f"compare: cut {design.aligned_cut}, steps {design.points} -> {out / 'compared'}",
        f"score: {pairs + len(design.points)} checkpoints -> {out / 'scores.json'}",
        f"report: figure 2, figure 6, table 3 -> {out / 'results'}",
    ]


if __name__ == "__main__":
    main()
