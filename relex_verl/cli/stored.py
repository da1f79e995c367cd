"""From a trajectory on disk: what it holds, observed checkpoints, predicted ones, rank-r reconstructions."""

from itertools import product
from typing import Annotated, Any

import torch
import typer

from relex_verl.cli.arguments import (
    AsJson,
    FitFrom,
    Merge,
    OutFolder,
    Rank,
    TrajectoryFolder,
    later_steps_of,
    methods_of,
)
from relex_verl.cli.screen import clear_errors, console, element_bar, print_json, table_of
from relex_verl.maths.diagnostics import describe, random_walk, summary
from relex_verl.maths.extrapolators import METHODS
from relex_verl.offline import analysis, face
from relex_verl.offline.merging import write_merged
from relex_verl.pipeline.prediction import write_checkpoint
from relex_verl.reporting.provenance import Checkout
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import step_ranges
from relex_verl.trajectory.store import Trajectory

__all__ = ["checkout", "extrapolate", "info", "reconstruct"]


def info(trajectory: TrajectoryFolder, as_json: AsJson = False) -> None:
    """Show what a trajectory holds and how straight it is, beside what a pure random walk would show."""
    with clear_errors():
        opened = Trajectory(trajectory)
        window = analysis.window(opened)
        steps = list(window.steps)
        figures = {name: summary(values) for name, values in describe(window).items()}
        null = {name: values.item() for name, values in describe(random_walk(window)).items()}
        size = sum(path.stat().st_size for path in trajectory.rglob("*") if path.is_file())
    facts: dict[str, Any] = {
        "base model": opened.index.base_model,
        "trajectory": opened.index.encoding,
        "observed steps": step_ranges(steps),
        "ranks": opened.index.world_size,
        "tensors": len(opened.names),
        "bytes": size,
        "run": opened.index.run,
    }
    if as_json:
        print_json({**facts, "steps": steps, "figures": figures, "random_walk": null})
        return
    for key, value in facts.items():
        console.print(f"[bold]{key}[/]: {value}", highlight=False)
    rows = [
        {
            "": name.replace("_", " "),
            **{key: values.get(key) for key in ("mean", "p10", "min")},
            "random walk": null[name],
        }
        for name, values in figures.items()
    ]
    console.print(table_of("over the tensors", rows))


def checkout(
    trajectory: TrajectoryFolder,
    step: Annotated[int, typer.Option(help="An observed step, or 0 for the origin.")],
    out: OutFolder,
    merge: Merge = False,
    as_json: AsJson = False,
) -> None:
    """Give back the Hugging Face checkpoint of an observed step.

    From a bf16 trajectory: bit for bit as verl held it. From an fp32 trajectory: the float32 reconstruction, with the
    bound of its error printed; of LoRA, the bound is that of the adapters.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        error = replay.error_bound(opened, step)
        facts = Checkout.of(step, error, opened.index.base_model, trajectory.resolve()).to_json()
        with element_bar(opened, f"step {step}") as advance:
            # A float32 state has digits that the base's own types would cut off; a bfloat16 one has none.
            dtype = torch.float32 if opened.kind.dtype == torch.float32 else None
            if merge:
                write_merged(opened, replay.states(opened, step), out, facts, advance)
            else:
                write_checkpoint(opened, replay.states(opened, step), out, facts, dtype, advance)
    if as_json:
        print_json({"step": step, "path": str(out), "max_error": error})
        return
    exact = "bit for bit" if error == 0 else f"float32, each weight within {error:.1e}"
    console.print(f"step {step} ({exact}): {out}", highlight=False)


def extrapolate(
    trajectory: TrajectoryFolder,
    t_cut: Annotated[int, typer.Option(help="Fit on the observed steps up to this one.")],
    target: Annotated[str, typer.Option(help="Steps to predict, separated by commas.")],
    out: OutFolder,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}, or several with commas.")] = "relex",
    rank: Rank = 1,
    fit_from: FitFrom = 1,
    merge: Merge = False,
    as_json: AsJson = False,
) -> None:
    """Predict checkpoints from the steps up to a cut, from the trajectory alone: OUT/<method>-step_<N>/.

    A good fit does not mean a good checkpoint: score each against the last observed one before you use it.
    """
    written = []
    with clear_errors():
        opened, targets = Trajectory(trajectory), later_steps_of(target, t_cut)
        for name, step in product(methods_of(method), targets):
            with element_bar(opened, f"{name}, step {step}") as advance:
                how: dict[str, Any] = {"fit_from": fit_from, "merge": merge, "progress": advance}
                folder = face.extrapolate(opened, step, t_cut, name, rank, out=out, **how)
            row = {"path": str(folder), "method": name, "rank": rank, "fit_from": fit_from}
            written.append({**row, "t_cut": t_cut, "target": step})
            if not as_json:
                console.print(f"{folder.name}: {folder}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"predictions": written})


def reconstruct(
    trajectory: TrajectoryFolder,
    step: Annotated[int, typer.Option(help="An observed step.")],
    out: OutFolder,
    rank: Rank = 1,
    t_cut: Annotated[int | None, typer.Option(help="Take the directions from the steps up to this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rank-r reconstruction of an observed checkpoint (Algorithm 1 of the paper).

    Replaces every tensor's trajectory by its top R directions and writes the checkpoint of STEP as they give it. If it
    scores like the checkpoint itself, those directions hold what the run learned.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        with element_bar(opened, f"rank {rank}, step {step}") as advance:
            face.reconstruct(opened, step, rank, out=out, t_cut=t_cut, progress=advance)
    if as_json:
        print_json({"path": str(out), "rank": rank, "step": step})
        return
    console.print(f"step {step} at rank {rank}: {out}", highlight=False, soft_wrap=True)
