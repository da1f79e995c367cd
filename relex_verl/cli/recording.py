"""`relex-verl ingest`: a finished run becomes a trajectory."""

from pathlib import Path
from typing import Annotated

import typer

from relex_verl.cli.common import AsJson, clear_errors, console, print_json, step_bar
from relex_verl.ingest import Found, IngestError, Options, find_checkpoints, find_revisions, select_steps
from relex_verl.ingest import ingest as ingest_checkpoints
from relex_verl.observer import Observation
from relex_verl.trajectory import step_ranges

__all__ = ["ingest"]


def ingest(
    base: Annotated[str, typer.Option(help="Folder or Hub id of the model that the run started from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the trajectory.")],
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder with global_step_5, step_5 or checkpoint-5 folders.")
    ] = None,
    hub: Annotated[str | None, typer.Option(help="Instead: a Hub repository whose revisions are steps.")] = None,
    revisions: Annotated[str, typer.Option(help="How its revisions are named.")] = "step_{N}",
    steps: Annotated[str | None, typer.Option(help="Which steps, e.g. 1-75 or 10,20,30; all if not given.")] = None,
    trajectory: Annotated[
        str, typer.Option(help="bf16, fp32, or auto: bf16 for bfloat16 checkpoints, fp32 for others.")
    ] = "auto",
    quantization: Annotated[str, typer.Option(help="Of an fp32 trajectory: int8, int4, or none.")] = "int8",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Use *.bin and verl's *.pt files (weights_only=True).")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Accept a base whose weights lie far from the checkpoints.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Record the checkpoints of a finished run as a trajectory, in one pass.

    Reads Hugging Face checkpoints (also under actor/huggingface in verl's layout), verl's FSDP shards (through verl's own
    merger, which rounds to bfloat16), or the revisions of a Hub repository. Interrupted, the same command goes on after
    the last step. Then: info, diagnose, extrapolate.
    """
    with clear_errors():
        found, source = _find(checkpoints, hub, revisions)
        found = select_steps(found, steps)
        options = Options(trajectory, quantization, allow_pickle, any_base)
        changed: dict[int, float] = {}

        with step_bar("reading headers", len(found)) as advance:

            def progress(seen: Observation) -> None:
                changed[seen.step] = seen.changed_share
                advance(1, f"step {seen.step}, {seen.changed_share:.2%} changed")

            recorded = ingest_checkpoints(base, found, source, out, options, progress)
    if as_json:
        facts = {"path": str(out), "encoding": recorded.index.encoding, "steps": recorded.steps}
        print_json({**facts, "added": list(changed), "changed_share": changed})
        return
    added = f"{len(changed)} added" if len(changed) < len(recorded.steps) else "all new"
    said = f"steps {step_ranges(recorded.steps)} ({added}), {recorded.index.encoding}: {out}"
    console.print(said, highlight=False, soft_wrap=True)


def _find(checkpoints: Path | None, hub: str | None, revisions: str) -> tuple[list[Found], str]:
    """The checkpoints, and what to call the place they are in."""
    if checkpoints is not None and hub is None:
        return find_checkpoints(checkpoints), str(checkpoints.resolve())
    if hub is not None and checkpoints is None:
        return find_revisions(hub, revisions), f"hub:{hub}"
    raise IngestError("give either --checkpoints FOLDER or --hub REPO")
