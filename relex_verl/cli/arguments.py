"""What the commands take: options, and what is meant by their text."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from relex_verl.maths.extrapolators import METHODS

__all__ = [
    "AllowPickle",
    "AsJson",
    "BaseNow",
    "Checkpoints",
    "Cut",
    "FitFrom",
    "Hub",
    "Merge",
    "OutFolder",
    "Rank",
    "Revisions",
    "StepPattern",
    "TrajectoryFolder",
    "WindowNumber",
    "later_steps_of",
    "methods_of",
    "steps_of",
    "tensors_of",
]

TrajectoryFolder = Annotated[
    Path,
    typer.Argument(metavar="TRAJECTORY", help="Folder with index.json: output_dir/trajectory, or what ingest wrote."),
]
WindowNumber = Annotated[
    int,
    typer.Option("--window", help="Of a run that jumped: which window, from 0, as info lists them; -1 is the last."),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Where to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Merge = Annotated[bool, typer.Option("--merge", help="Of LoRA: full weights like the base's, not an adapter.")]
Rank = Annotated[int, typer.Option(min=1, help="Directions kept for each tensor; the paper uses 1.")]
Cut = Annotated[int | None, typer.Option(help="Use the observed steps up to this one; all of them if not given.")]
FitFrom = Annotated[int, typer.Option(min=0, help="First step that takes part in the fit: leaves a warm-up out.")]
BaseNow = Annotated[
    str | None, typer.Option("--base", help="Folder or Hub id of the base model, where it was moved since.")
]
Checkpoints = Annotated[
    Path | None, typer.Option(help="Folder with a folder for each step, like global_step_5 or checkpoint-5.")
]
StepPattern = Annotated[
    str | None,
    typer.Option(help="How these are named, where that is not found out: e.g. run/epoch_{N}/weights, * is any text."),
]
Hub = Annotated[str | None, typer.Option(help="Instead: a Hub repository whose revisions, or folders, are steps.")]
Revisions = Annotated[
    str, typer.Option(help="How its revisions are named, text around {N}; without {N} the one that has the folders.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Use *.bin and verl's *.pt files (weights_only=True).")
]


def steps_of(text: str, option: str) -> list[int]:
    """Whole step numbers separated by commas; a range with `...` goes on as it began, or by 100: 200,400,...,1000.

    Raises:
        ValueError: anything else, naming the option.
    """
    cure = f"{option} {text}: give whole step numbers separated by commas, e.g. 50,75 or 200,400,...,1000"
    parts, steps = [part.strip() for part in text.split(",")], list[int]()
    try:
        for i, part in enumerate(parts):
            if part in ("...", "…"):
                stride, end = (steps[-1] - steps[-2] if len(steps) > 1 else 100), int(parts[i + 1])
                if stride <= 0:
                    raise ValueError(cure)
                steps += range(steps[-1] + stride, end, stride)
            else:
                steps.append(int(part))
    except (ValueError, IndexError):
        raise ValueError(cure) from None
    if min(steps) < 1:
        raise ValueError(f"{option} {text}: steps start at 1")
    return sorted(set(steps))


def later_steps_of(text: str, cut: int) -> list[int]:
    """The steps of --target, all of them after the cut.

    Raises:
        ValueError: one that is not.
    """
    steps = steps_of(text, "--target")
    if steps[0] <= cut:
        raise ValueError(f"--target {steps[0]} is not after --t-cut {cut}: give later steps, or cut earlier")
    return steps


def methods_of(text: str) -> list[str]:
    """Names in METHODS separated by commas.

    Raises:
        ValueError: another name.
    """
    methods = [part.strip() for part in text.split(",")]
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--method {method}: give one of {', '.join(METHODS)}")
    return methods


def tensors_of(text: str, names: Sequence[str]) -> list[str]:
    """Tensors separated by commas, each by its name or a part that no other name has.

    Raises:
        ValueError: no tensor, or several, are called so.
    """
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        named = [part] if part in names else [name for name in names if part and part in name]
        if len(named) != 1:
            shown = ", ".join(named[:3] or difflib.get_close_matches(part, names, 3, 0.0))
            raise ValueError(f"--tensor {part}: {len(named) or 'no'} tensors are called so, e.g. {shown}")
        chosen += named
    return chosen
