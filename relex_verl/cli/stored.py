"""From a trajectory on disk: what it holds, observed checkpoints, predicted ones, rank-r reconstructions."""

from dataclasses import replace
from itertools import product
from typing import Annotated, Any

import torch
import typer

from relex_verl.cli.arguments import (
    AsJson,
    BaseNow,
    FitFrom,
    Merge,
    OutFolder,
    Rank,
    TrajectoryFolder,
    WindowNumber,
    later_steps_of,
    methods_of,
)
from relex_verl.cli.screen import clear_errors, console, element_bar, print_fact, print_json, table_of
from relex_verl.maths.diagnostics import describe, random_walk, summary
from relex_verl.maths.extrapolators import METHODS
from relex_verl.offline import analysis, face
from relex_verl.offline.merging import write_merged
from relex_verl.pipeline.prediction import write_checkpoint
from relex_verl.reporting.provenance import Checkout
from relex_verl.run.scores import FILE, best_of, read_scores
from relex_verl.trajectory import replay
from relex_verl.trajectory.holding import last_before, window_holding
from relex_verl.trajectory.index import step_ranges
from relex_verl.trajectory.store import Trajectory
from relex_verl.trajectory.windows import WindowRecord

__all__ = ["checkout", "extrapolate", "info", "reconstruct"]


def info(
    trajectory: TrajectoryFolder,
    window: Annotated[
        int | None,
        typer.Option(help="Show how straight this one is, from 0; the last with observed steps if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a trajectory holds and how straight it is, beside what a pure random walk would show.

    Of a run that jumped also its windows: what each began with, and the steps that were observed from there on.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        observed = [number for number, record in enumerate(opened.windows) if record.steps]
        opened = opened.of_window((observed or [-1])[-1] if window is None else window)
        rows = analysis.window(opened)
        figures = {name: summary(values) for name, values in describe(rows).items()}
        null = {name: values.item() for name, values in describe(random_walk(rows)).items()}
        size = sum(path.stat().st_size for path in trajectory.rglob("*") if path.is_file())
    steps = [step for record in opened.windows for step in record.steps]
    facts: dict[str, Any] = {
        "base model": opened.index.base_model,
        "trajectory": opened.index.encoding,
        **({"tensors in their own encoding": opened.index.encodings} if opened.index.encodings else {}),
        "observed steps": step_ranges(steps),
        "ranks": opened.index.world_size,
        "tensors": len(opened.names),
        "bytes": size,
        "run": opened.index.run,
    }
    if as_json:
        windows = [{"window": number, **vars(record)} for number, record in enumerate(opened.windows)]
        shown = {"figures": figures, "figures_of_window": opened.number, "random_walk": null}
        print_json({**facts, "steps": steps, "windows": windows, **shown})
        return
    for key, value in facts.items():
        print_fact(key, value)
    if len(opened.windows) > 1:
        console.print(table_of("windows", [_window_row(*numbered) for numbered in enumerate(opened.windows)]))
    table = [
        {
            "": name.replace("_", " "),
            **{key: values.get(key) for key in ("mean", "p10", "min")},
            "random walk": null[name],
        }
        for name, values in figures.items()
    ]
    of_window = f", in window {opened.number}" if len(opened.windows) > 1 else ""
    console.print(table_of(f"over the tensors{of_window}", table))


def _window_row(number: int, record: WindowRecord) -> dict[str, Any]:
    """What the table of `info` says of one."""
    origin = "the base model" if record.origin == "base" else "the weights as trained"
    if record.undone:
        origin = "the weights before a jump, undone"
    if record.jump is not None:
        jump = record.jump
        kept = {"keep": "kept", "reset": "begun anew"}[jump["optimizer"]]
        origin = f"jump: {jump['method']}-step_{jump['target']}, rank {jump['rank']}, from step {jump['fit_from']} on"
        origin += f", optimizer {kept}"
    seen = {"observed steps": step_ranges(record.steps), "rows": len(record.steps)}
    return {"window": number, "begins at": record.origin_step, "with": origin, **seen}


def checkout(
    trajectory: TrajectoryFolder,
    out: OutFolder,
    step: Annotated[int | None, typer.Option(help="An observed step, or 0 for the origin.")] = None,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="Instead of --step: the step that the run's own validation scored highest (the earliest of equal ones), or "
            "the last observed before it.",
        ),
    ] = False,
    metric: Annotated[
        str | None, typer.Option(help="Of --best, as verl logs it; the run's deciding one if not given.")
    ] = None,
    after_jump: Annotated[
        bool,
        typer.Option(
            "--after-jump", help="Of a step at which the run jumped, or a jump was undone: what it went on with."
        ),
    ] = False,
    merge: Merge = False,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Give back the Hugging Face checkpoint of an observed step, of whatever window.

    From a bf16 trajectory: bit for bit as verl held it. From an fp32 trajectory: the float32 reconstruction, with the
    bound of its error printed; of LoRA, the bound is that of the adapters.
    """
    with clear_errors():
        opened, scored = Trajectory(trajectory, base=base), None
        if best:
            if step is not None or after_jump:
                raise ValueError(
                    "--best chooses the step, and what a jump at it led to: leave out --step, --after-jump"
                )
            scored = best_of(read_scores(trajectory.resolve().parent / FILE), metric)
            opened, step, after_jump = last_before(opened, scored[0].step)
        elif step is None or metric is not None:
            raise ValueError("give --step N, or --best with or without --metric")
        else:
            opened = window_holding(opened, step, after_jump)
        error = replay.error_bound(opened, step)
        exact_score = scored is not None and scored[0].step == step
        own = opened.index.encodings
        where = opened.index.base_model, trajectory.resolve(), opened.number, after_jump, own
        made = Checkout.of(step, error, *where)
        if scored is not None and exact_score:
            made = replace(made, metric=scored[1], score=scored[2])
        facts = made.to_json()
        with element_bar(opened, f"step {step}") as advance:
            # A float32 state has digits that the base's own types would cut off; a bfloat16 one has none.
            dtype = torch.float32 if opened.kind.dtype == torch.float32 else None
            if merge:
                write_merged(opened, replay.states(opened, step), out, facts, advance)
            else:
                write_checkpoint(opened, replay.states(opened, step), out, facts, dtype, advance)
    chosen = {} if scored is None else {"best": {"step": scored[0].step, "metric": scored[1], "score": scored[2]}}
    if as_json:
        print_json({"step": step, "path": str(out), "max_error": error, **chosen})
        return
    if scored is not None:
        console.print(f"best: step {scored[0].step}, {scored[1]} {scored[2]:.4g}", highlight=False)
        if not exact_score:
            said = f"step {scored[0].step} was not observed; step {step} is the last before it that was"
            console.print(f"{said}, and its own score is not known", highlight=False)
    which = f"bit for bit; {len(own)} tensors in float32" if own else "float32"
    exact = "bit for bit" if error == 0 else f"{which}, each weight within {error:.1e}"
    console.print(f"step {step} ({exact}): {out}", highlight=False)


def extrapolate(
    trajectory: TrajectoryFolder,
    t_cut: Annotated[int, typer.Option(help="Fit on the observed steps up to this one.")],
    target: Annotated[str, typer.Option(help="Steps to predict, separated by commas.")],
    out: OutFolder,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}, or several with commas.")] = "relex",
    rank: Rank = 1,
    fit_from: FitFrom = 1,
    window: WindowNumber = -1,
    merge: Merge = False,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Predict checkpoints from the steps up to a cut, from the trajectory alone: OUT/<method>-step_<N>/.

    A good fit does not mean a good checkpoint: score each against the last observed one before you use it.
    """
    written = []
    with clear_errors():
        opened, targets = Trajectory(trajectory, window, base), later_steps_of(target, t_cut)
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
    window: WindowNumber = -1,
    base: BaseNow = None,
    as_json: AsJson = False,
) -> None:
    """Rank-r reconstruction of an observed checkpoint (Algorithm 1 of the paper).

    Replaces every tensor's trajectory by its top R directions and writes the checkpoint of STEP as they give it. If it
    scores like the checkpoint itself, those directions hold what the run learned.
    """
    with clear_errors():
        opened = Trajectory(trajectory, window, base)
        with element_bar(opened, f"rank {rank}, step {step}") as advance:
            face.reconstruct(opened, step, rank, out=out, t_cut=t_cut, progress=advance)
    if as_json:
        print_json({"path": str(out), "rank": rank, "step": step})
        return
    console.print(f"step {step} at rank {rank}: {out}", highlight=False, soft_wrap=True)
