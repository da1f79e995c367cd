"""`relex-verl ingest`: a finished run becomes a trajectory."""

from pathlib import Path
from typing import Annotated

import typer

from relex_verl.cli.arguments import AllowPickle, AsJson, Checkpoints, Hub, Revisions, StepPattern
from relex_verl.cli.screen import clear_errors, console, notes, print_json, step_bar
from relex_verl.offline.ingest import Options, checkpoints_in, recorded_steps, select_steps
from relex_verl.offline.ingest import ingest as ingest_checkpoints
from relex_verl.pipeline.observer import Observation
from relex_verl.trajectory.index import step_ranges

__all__ = ["ingest"]


def ingest(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the model that the run started from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the trajectory.")],
    checkpoints: Checkpoints = None,
    hub: Hub = None,
    revisions: Revisions = "step_{N}",
    step_pattern: StepPattern = None,
    steps: Annotated[str | None, typer.Option(help="Which steps, e.g. 1-75 or 10,20,30; all if not given.")] = None,
    trajectory: Annotated[
        str, typer.Option(help="bf16, fp32, or auto: bf16 for bfloat16 checkpoints, fp32 for others.")
    ] = "auto",
    quantization: Annotated[
        str,
        typer.Option(
            help="Of an fp32 trajectory: int8, int4, none, or auto: none for what `relex-verl checkout` wrote and for a few "
            "float32 tensors among bfloat16 ones, else int8."
        ),
    ] = "auto",
    allow_pickle: AllowPickle = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base that lies over 3 % away from the first checkpoint.")
    ] = False,
    accept_jump: Annotated[
        bool,
        typer.Option("--accept-jump", help="Accept a checkpoint that lies much further away than those before it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Record the checkpoints of a finished run as a trajectory, in one pass.

    Reads Hugging Face checkpoints wherever a framework puts them in a step's folder, LoRA adapters (merged into the base),
    verl's FSDP shards (through verl's own merger, which rounds to bfloat16), or a Hub repository. Interrupted, the same
    command goes on after the last step. Then: info, diagnose, extrapolate.
    """
    with clear_errors():
        options = Options(trajectory, quantization, allow_pickle, any_base, accept_jump)
        found, source = checkpoints_in(checkpoints, hub, revisions, step_pattern)
        found = select_steps(found, steps)
        new = {checkpoint.step for checkpoint in found} - set(recorded_steps(out))
        changed: dict[int, float] = {}
        if new and any(checkpoint.kind == "verl" for checkpoint in found):
            notes.print("note: verl's merger rounds the shards to bfloat16, whatever they hold", highlight=False)

        with step_bar("reading headers", len(new)) as advance:

            def progress(seen: Observation) -> None:
                changed[seen.step] = seen.changed_share
                advance(1, f"step {seen.step}, {seen.changed_share:.2%} changed")

            recorded = ingest_checkpoints(base, found, source, out, options, progress)
    others = sorted(file.name for file in recorded.files.glob("*"))
    if others:
        notes.print(
            f"note: the run's {', '.join(others)} differ from the base's: predictions take the run's", highlight=False
        )
    if as_json:
        facts = {"path": str(out), "encoding": recorded.index.encoding, "steps": recorded.steps}
        print_json({**facts, "added": list(changed), "changed_share": changed})
        return
    added = f"{len(changed)} added" if len(changed) < len(recorded.steps) else "all new"
    said = f"steps {step_ranges(recorded.steps)} ({added}), {recorded.index.encoding}: {out}"
    console.print(said, highlight=False, soft_wrap=True)
