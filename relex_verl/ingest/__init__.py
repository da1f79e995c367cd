"""A finished run becomes a trajectory: one pass over its checkpoints, through the same `Observer` as a running training.

The trajectory is that of a one-rank run which observed the same steps, bit for bit. An interrupted pass goes on after the
last committed step.
"""

import errno
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from relex_verl.collectors import RowCollector
from relex_verl.encodings import encoding_name
from relex_verl.hf_checkpoint import BaseCheckpoint, resolve_model
from relex_verl.ingest.checkpoints import Found, IngestError, find_checkpoints, find_revisions, select_steps
from relex_verl.ingest.layout import CheckpointSource, Layout, check_same_origin, open_checkpoint
from relex_verl.observer import Observation, Observer
from relex_verl.trajectory import Trajectory, step_ranges

__all__ = [
    "CheckpointSource",
    "Found",
    "IngestError",
    "Options",
    "find_checkpoints",
    "find_revisions",
    "ingest",
    "select_steps",
]


@dataclass(frozen=True)
class Options:
    """How to ingest.

    Attributes:
        trajectory: "bf16", "fp32", or "auto": bf16 where all checkpoints are bfloat16, else fp32, so that nothing is lost.
        quantization: of fp32: "int8", "int4" or "none".
        allow_pickle: use checkpoints that need unpickling.
        any_base: do not compare the weights of the first checkpoint with those of the base.
    """

    trajectory: str = "auto"
    quantization: str = "int8"
    allow_pickle: bool = False
    any_base: bool = False


def ingest(
    base_model: str,
    found: Sequence[Found],
    source: str,
    out: Path,
    options: Options = Options(),
    progress: Callable[[Observation], None] = lambda observation: None,
) -> Trajectory:
    """Record the checkpoints as a trajectory, or go on with one that an earlier call began.

    Args:
        base_model: folder or Hub id of the model that the run started from.
        found: the checkpoints, ascending steps.
        source: what they were found in; a trajectory goes on only with checkpoints of the same source.
        out: folder of the trajectory.
        options: how.
        progress: called after every committed step.

    Raises:
        IngestError: a checkpoint that cannot be used, another trajectory in `out`, or no space left. Committed steps stay;
            without any, `out` is as it was before.
    """
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    base = open_checkpoint(resolve_model(base_model))
    layout = _common_layout(base, found, options)
    encoding = _encoding(layout, options)
    done = _committed(out, base_model, source, encoding)
    todo = _still_to_do(found, done, out)
    existed = out.exists()
    observer = Observer(out, base_model, layout.aliases, {"ingested_from": source}, encoding)
    try:
        observer.start(CheckpointSource(base.folder, layout.shapes))
        observer.open(done[-1] if done else 0)
        _keep_on_disk(observer)
        for one in todo:
            progress(_observe(observer, one, layout, options))
    except BaseException as error:
        if not observer.steps and not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise _in_words(error, observer.steps, out) from error
    return observer.trajectory


def _observe(observer: Observer, one: Found, layout: Layout, options: Options) -> Observation:
    with one.opened(options.allow_pickle) as folder:
        layout.check(open_checkpoint(folder))
        try:
            observation = observer.observe(one.step, CheckpointSource(folder, layout.shapes))
        except ValueError as error:
            raise IngestError(f"step {one.step} ({one.place}): {error}") from error
    rows = observer.collector
    assert isinstance(rows, RowCollector)
    rows.packed[-1] = observer.trajectory.stored(0, one.step)  # type: ignore[call-overload]
    return observation


def _keep_on_disk(observer: Observer) -> None:
    """Let go of what a one-process pass need not hold: the pages of the base, and the increments of earlier steps."""
    observer.reopen_base()
    rows = observer.collector
    assert isinstance(rows, RowCollector)
    rows.packed = [observer.trajectory.stored(0, step) for step in observer.steps]  # type: ignore[misc]


def _common_layout(base: BaseCheckpoint, found: Sequence[Found], options: Options) -> Layout:
    """Check all that headers tell before anything is written; what must be merged or downloaded is checked in its turn."""
    with found[0].opened(options.allow_pickle) as folder:
        first = open_checkpoint(folder)
        layout = Layout.of(base, first)
        layout.check(first)
        if not options.any_base:
            check_same_origin(base, first, list(layout.shapes))
    for one in found[1:]:
        if one.kind == "safetensors":
            layout.check(open_checkpoint(Path(one.place)))
        elif one.kind != "hub" and not options.allow_pickle:
            with one.opened():
                pass
    return layout


def _encoding(layout: Layout, options: Options) -> str:
    kinds = ("auto", "bf16", "fp32")
    if options.trajectory not in kinds:
        raise IngestError(f"--trajectory {options.trajectory}: give one of {', '.join(kinds)}")
    if options.quantization not in ("int8", "int4", "none"):
        raise IngestError(f"--quantization {options.quantization}: give one of int8, int4, none")
    trajectory = options.trajectory
    if trajectory == "auto":
        trajectory = "bf16" if layout.exact_in_bf16 else "fp32"
    return encoding_name(trajectory, options.quantization)


def _committed(out: Path, base_model: str, source: str, encoding: str) -> list[int]:
    """Steps that `out` holds already.

    Raises:
        IngestError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return []
    if not (out / "index.json").exists():
        raise IngestError(f"--out {out} exists and is no trajectory: give a new folder")
    index = Trajectory(out).index
    here = {"base model": base_model, "checkpoints": source, "encoding": encoding}
    there = {
        "base model": index.base_model,
        "checkpoints": index.run.get("ingested_from"),
        "encoding": index.encoding,
    }
    for key, value in here.items():
        if there[key] != value:
            raise IngestError(
                f"--out {out} holds another trajectory ({key}: {there[key]!r} there, {value!r} here): give a new folder"
            )
    return list(index.windows[-1].steps)


def _still_to_do(found: Sequence[Found], done: Sequence[int], out: Path) -> list[Found]:
    late = [one.step for one in found if done and one.step < done[-1] and one.step not in done]
    if late:
        raise IngestError(
            f"--out {out} goes up to step {done[-1]} without step {late[0]}, and steps are added in order: "
            "give a new folder, or leave that step out with --steps"
        )
    return [one for one in found if one.step not in done]


def _in_words(error: BaseException, steps: Sequence[int], out: Path) -> BaseException:
    """Out of space in words; everything with what is kept."""
    kept = f"; steps {step_ranges(steps)} are kept in {out}, run the same command again to go on" if steps else ""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors reports a failed write as an error of its own, with the system's text in it.
    if full or (isinstance(error, SafetensorError) and "No space left" in str(error)):
        return IngestError(f"--out {out}: no space left on the device: make room{kept}")
    return IngestError(f"{error}{kept}") if isinstance(error, IngestError) else error
