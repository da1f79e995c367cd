"""`python -m judge`: simulate, count, and print the tables. See run.sh."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean

from rich.progress import track

from judge.decisions import Outcome, simulate
from judge.world import World, flat, rising

# What no prediction gains in; a row each.
NULLS: dict[str, World] = {
    "one answer a prompt": World(200, flat(0)),
    "the same, 500 prompts": World(500, flat(0)),
    "four answers a prompt": World(200, flat(0), samples=4),
    "partial credit in quarters": World(200, flat(0), levels=4),
    "each prompt twice in the set": World(200, flat(0), repeats=2),
    "templates of five prompts, which weights change alike": World(200, flat(0), cluster=5),
    "every prediction is a point worse": World(200, flat(-0.01)),
}
GAINS, SIZES = (0.01, 0.02, 0.05), (200, 500, 2000)


def main() -> None:
    """Simulate every row and print it as it comes."""
    parser = argparse.ArgumentParser(prog="recipes/judge/run.sh", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=2000, help="simulated runs a row of the nulls (2000); power takes a fifth"
    )
    parser.add_argument("--out", type=Path, help="write the tables there, too")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)  # a line a validation
    lines = tables(arguments.runs, NULLS, SIZES)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text)


def tables(runs: int, nulls: Mapping[str, World], sizes: Sequence[int]) -> list[str]:
    """Three pipe tables: wrong stops, jumps, and power.

    Args:
        runs: simulated a row of the first; the largest size takes a quarter of what the others do.
        nulls: name -> validation set, in which no prediction is better.
        sizes: of the validation sets of the others, three.
    """
    power = max(1, runs // 5)
    lines = [f"Runs without a better prediction ({runs} each)", "", "| validation set | wrong stops |", "| --- | --- |"]
    lines += [f"| {name} | {share(world, runs, stopped)} |" for name, world in nulls.items()]
    counts = [power, power, power // 4]
    header = [f"| true gain | {' | '.join(f'{size} prompts' for size in sizes)} |", "| --- | --- | --- | --- |"]
    lines += ["", f"Jumps to predictions that are all alike ({power} runs each), by decision", "", *header]
    for gain in (-0.05, -0.02, -0.01, 0.0, 0.01, 0.02, 0.05):
        cells = [share(World(size, flat(gain)), n, jumped, "jump") for size, n in zip(sizes, counts, strict=True)]
        lines.append(f"| {100 * gain:+.0f} points | {' | '.join(cells)} |")
    lines += ["", f"Runs that stop where the best horizon gains ({power} runs each)", "", *header]
    for gain in GAINS:
        cells = [share(World(size, rising(gain)), n, stopped) for size, n in zip(sizes, counts, strict=True)]
        lines.append(f"| {100 * gain:+.0f} points | {' | '.join(cells)} |")
    return lines


def stopped(outcome: Outcome) -> float:
    """Of a run: whether it was told to stop at one of its cuts."""
    return float(outcome.any("stop"))


def jumped(outcome: Outcome) -> float:
    """Of a run: the share of its decisions that are jumps."""
    return fmean(advice.action == "jump" for advice in outcome.advice)


def share(world: World, runs: int, count: Callable[[Outcome], float], on_cut: str = "advise") -> str:
    """Mean over simulated runs, with two standard errors."""
    values = [count(simulate(world, seed, on_cut)) for seed in track(range(max(2, runs)), transient=True)]
    mean = fmean(values)
    error = 2 * sqrt(fmean((value - mean) ** 2 for value in values) / len(values))
    return f"{100 * mean:.1f} ± {100 * error:.1f} %"


if __name__ == "__main__":
    main()
