"""A finished run becomes a trajectory: one pass over its checkpoints, through the same `Observer` as a running training.

The trajectory is that of a one-rank run which observed the same steps. Checkouts of a run's own steps give back its Gram
matrix and its predictions: of a bf16 trajectory the same increments, bit for bit, and G up to the order of summation (the
ranks add up their parts); of an fp32 trajectory float32 states without any further loss, so G up to the rounding of float32
and at least 99.99 % of the predicted bfloat16 weights. An interrupted pass goes on after the last committed step.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from relex_verl.offline.ingest.checkpoints import Found
from relex_verl.offline.ingest.errors import IngestError
from relex_verl.offline.ingest.finding import checkpoints_in, find_checkpoints, find_revisions, select_steps, within
from relex_verl.offline.ingest.going_on import begun_in, check_unchanged, still_to_do
from relex_verl.offline.ingest.layout import Checkpoint, Layout, check_same_origin, check_tied
from relex_verl.offline.ingest.options import AS_IT_COMES, Options
from relex_verl.offline.ingest.other_files import keep_differing
from relex_verl.offline.ingest.plausible import check_moved, check_plausible
from relex_verl.offline.ingest.source import CheckpointSource
from relex_verl.offline.ingest.temporary import alone_in
from relex_verl.pipeline.observer import Observation, Observer
from relex_verl.trajectory.collectors import RowCollector
from relex_verl.trajectory.files import is_full
from relex_verl.trajectory.hf_checkpoint import resolve_model
from relex_verl.trajectory.index import step_ranges
from relex_verl.trajectory.parallel import all_processors
from relex_verl.trajectory.store import Trajectory

__all__ = [
    "Checkpoint",
    "CheckpointSource",
    "Found",
    "IngestError",
    "Options",
    "checkpoints_in",
    "find_checkpoints",
    "find_revisions",
    "ingest",
    "recorded_steps",
    "select_steps",
    "within",
]


def ingest(
    base_model: str,
    found: Sequence[Found],
    source: str,
    out: Path,
    options: Options = AS_IT_COMES,
    progress: Callable[[Observation], None] = lambda observation: None,
) -> Trajectory:
    """Record the checkpoints as a trajectory, or go on with one that an earlier call began.

    Every checkpoint that is still to be recorded is opened (merged, downloaded) once; of all others only headers are read.

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
        FileNotFoundError: no base model.
    """
    if Path(base_model).is_dir():
        base_model = str(Path(base_model).resolve())
    base = Checkpoint(resolve_model(base_model))
    # Temporary copies lie beside the trajectory: there is room for checkpoints where a run's results go, rarely in /tmp.
    workspace = next(folder for folder in out.resolve().parents if folder.is_dir())
    with alone_in(workspace, out):
        return _ingest(base_model, base, found, source, out, options, progress, workspace)


def _ingest(
    base_model: str,
    base: Checkpoint,
    found: Sequence[Found],
    source: str,
    out: Path,
    options: Options,
    progress: Callable[[Observation], None],
    workspace: Path,
) -> Trajectory:
    begun = begun_in(out, base_model, base, source, options)
    todo = still_to_do(found, begun.steps if begun else [], out)
    if begun:
        check_unchanged(begun, found)
    if begun and not todo:
        return begun
    with ExitStack() as opened:
        folder = opened.enter_context(todo[0].opened(options.allow_pickle, workspace, base))
        first = Checkpoint(folder, todo[0].called)
        layout = _common_layout(base, first, found, todo[0], options, begun)
        if begun is None and not options.any_base:
            check_same_origin(base, first, list(layout.shapes))
        kind = options.kind(layout, folder, begun.kind if begun else None)
        observer = Observer(out, base_model, layout.aliases, {"ingested_from": source}, kind)
        with _nothing_half_written(out, observer), all_processors() as threads:
            _rows(observer).threads = threads
            observer.start(CheckpointSource(base, layout.shapes))
            norm_L = torch.tensor(
                [torch.linalg.vector_norm(held.state, dtype=torch.float64) for held in observer.held.values()],
                dtype=torch.float64,
            )
            observer.open(begun.steps[-1] if begun else 0)
            observer.reopen_base()
            _leave_to_disk(observer)
            for entry in todo:
                if entry is not todo[0]:
                    opened.close()  # of the step before
                    folder = opened.enter_context(entry.opened(options.allow_pickle, workspace, base))
                checkpoint = first if entry is todo[0] else layout.find_in(Checkpoint(folder, entry.called))
                if (
                    entry is todo[-1]
                ):  # before the step counts: where they cannot be kept, the same command goes on with it
                    for place in (Path(entry.place), Path(entry.place) / "huggingface", folder):
                        keep_differing(base.folder, place, observer.trajectory.files)
                seen = _observe(observer, entry, checkpoint, layout, None if options.accept_jump else norm_L)
                progress(seen)
            check_moved(observer.steps, _rows(observer).squares_LT)
    return observer.trajectory


@contextmanager
def _nothing_half_written(out: Path, observer: Observer) -> Iterator[None]:
    """On an error before the first committed step, or where nothing has moved, `out` is as it was; committed ones stay."""
    existed, before = out.exists(), recorded_steps(out)
    try:
        yield
    except BaseException as error:
        if not before and not _rows(observer).squares_LT.any():
            shutil.rmtree(out, ignore_errors=True)
            if existed:
                out.mkdir(exist_ok=True)
        kept = recorded_steps(out)
        raise _in_words(error, kept, out) from error


def recorded_steps(out: Path) -> list[int]:
    """The steps that a trajectory holds already; none where there is no trajectory."""
    return Trajectory(out).steps if (out / "index.json").exists() else []


def _observe(
    observer: Observer, entry: Found, checkpoint: Checkpoint, layout: Layout, norm_L: torch.Tensor | None
) -> Observation:
    """Record a step; `norm_L` is |theta_0| of each tensor, None to take whatever comes."""
    check_tied(checkpoint, layout.aliases)
    layout.check_still(checkpoint)

    def accept(row_LT: torch.Tensor) -> None:
        if norm_L is not None:
            past_LT = _rows(observer).squares_LT
            check_plausible(entry.called, entry.step, observer.steps, layout.shapes, norm_L, past_LT, row_LT[:, -1])

    before = dict(observer.trajectory.index.ingested)
    observer.trajectory.index.ingested[str(entry.step)] = entry.fingerprint
    try:
        observation = observer.observe(entry.step, CheckpointSource(checkpoint, layout.shapes), accept)
    except BaseException as error:
        observer.trajectory.index.ingested = before
        if entry.step not in observer.steps:
            observer.trajectory.delete(0, [entry.step])
        raise IngestError(f"{entry.called}: {error}") if isinstance(error, ValueError) else error from error
    _leave_to_disk(observer)
    return observation


def _leave_to_disk(observer: Observer) -> None:
    """Let go of the increments that a one-process pass need not hold."""
    _rows(observer).leave_to_disk(observer.trajectory, 0)


def _rows(observer: Observer) -> RowCollector:
    assert isinstance(observer.collector, RowCollector)
    return observer.collector


def _common_layout(
    base: Checkpoint,
    first: Checkpoint,
    found: Sequence[Found],
    opened: Found,
    options: Options,
    begun: Trajectory | None,
) -> Layout:
    """Check all that headers tell before anything is written; what must be merged or downloaded is checked in its turn.

    A few tensors of another type that never move (float32 router biases among bfloat16 weights) are not followed: they are
    the base's. Where not all checkpoints can be looked into before, that is not known, and they are.

    Args:
        base: the base model.
        first: the first checkpoint that is to be recorded, opened.
        found: all checkpoints.
        opened: which of them is `first`.
        options: how to ingest.
        begun: the steps before them.
    """
    layout = Layout.of(base, first)
    layout.check(first)
    check_tied(base, layout.aliases)
    follows_all = options.trajectory == "fp32" or any(entry.kind != "safetensors" for entry in found)
    unmoved = set() if follows_all else layout.unmoved(layout.wide, first)
    for entry in found:
        entry.check_allowed(options.allow_pickle)
        if entry.kind == "safetensors" and entry is not opened:
            there = layout.find_in(Checkpoint(Path(entry.place), entry.called))
            unmoved = layout.unmoved(unmoved, there)
    if begun is not None:  # as it was decided then
        return layout.without([name for name in layout.shapes if name not in begun.index.tensors])
    return layout.without(sorted(unmoved)) if layout.exact_in_bf16(layout.wide) else layout


def _in_words(error: BaseException, steps: Sequence[int], out: Path) -> BaseException:
    """Out of space in words; everything with what is kept."""
    kept = f"steps {step_ranges(steps)} are kept in {out}, run the same command again to go on" if steps else ""
    then = f"; {kept}" if kept else ""
    if isinstance(error, IngestError):
        return IngestError(f"{error}{then}")
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(*error.args, kept or f"no step was recorded yet, and {out} is as it was")
    if is_full(error):
        return IngestError(f"--out {out}: no space left on the device: make room{then}")
    return error
