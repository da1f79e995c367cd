"""Going on with a trajectory that an earlier call began: what is there, whether it is the same, what is still to do."""

from collections.abc import Sequence
from pathlib import Path

from relex_verl.offline.ingest.checkpoints import Found
from relex_verl.offline.ingest.errors import IngestError
from relex_verl.offline.ingest.layout import Checkpoint
from relex_verl.offline.ingest.options import Options
from relex_verl.trajectory.base import check_base
from relex_verl.trajectory.fingerprint import of_tensors
from relex_verl.trajectory.store import Trajectory

__all__ = ["begun_in", "check_unchanged", "still_to_do"]


def begun_in(out: Path, base_model: str, base: Checkpoint, source: str, options: Options) -> Trajectory | None:
    """The trajectory that `out` holds already, if it holds a step.

    Raises:
        IngestError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise IngestError(f"--out {out} is a file: give a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / "index.json").exists():
        raise IngestError(f"--out {out} exists and is no trajectory: give a new folder")
    there = Trajectory(out)
    if there.index.base_model != base_model and there.index.base_fingerprint == of_tensors(base):
        there.index.base_model = base_model  # it was moved
        there.write_index()
    differing = {
        "base model": (there.index.base_model, base_model),
        "checkpoints": (there.index.run.get("ingested_from"), source),
    }
    for key, (theirs, ours) in differing.items():
        if theirs != ours:
            raise IngestError(
                f"--out {out} holds another trajectory ({key}: {theirs!r} there, {ours!r} here): give a new folder"
            )
    try:
        check_base(there.index, base)
    except ValueError as error:
        raise IngestError(
            f"--base {base_model} has changed since --out {out} was begun ({error}): give the old one"
        ) from None
    if not options.allow(there.kind):
        raise IngestError(f"--out {out} holds another trajectory (encoding {there.index.encoding}): give a new folder")
    return there if there.steps else None


def check_unchanged(begun: Trajectory, found: Sequence[Found]) -> None:
    """What was recorded before must still be what is there: it is not read again.

    Raises:
        IngestError: a checkpoint was overwritten.
    """
    for entry in found:
        known = begun.index.ingested.get(str(entry.step), "")
        if known and entry.fingerprint and known != entry.fingerprint:
            raise IngestError(
                f"{entry.called} was overwritten since it was recorded in {begun.folder}: give a new --out to record it as "
                "it is now, or leave it out with --steps"
            )


def still_to_do(found: Sequence[Found], done: Sequence[int], out: Path) -> list[Found]:
    late = [entry.step for entry in found if done and entry.step < done[-1] and entry.step not in done]
    if late:
        raise IngestError(
            f"--out {out} goes up to step {done[-1]} without step {late[0]}, and steps are added in order: "
            "give a new folder, or leave that step out with --steps"
        )
    return [entry for entry in found if entry.step not in done]
