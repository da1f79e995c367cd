"""A finished run becomes a trajectory: one pass over its checkpoints, through the same `Observer` as a running training.

The trajectory is that of a one-rank run which observed the same steps. Checkouts of a run's own steps give back its Gram
matrix and its predictions: of a bf16 trajectory the same increments, bit for bit, and G up to the order of summation (the
ranks add up their parts); of an fp32 trajectory float32 states without any further loss, so G up to the rounding of float32
and at least 99.99 % of the predicted bfloat16 weights. An interrupted pass goes on after the last committed step.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from relex_verl.offline.ingest.checkpoints import (
    Found,
    IngestError,
    checkpoints_in,
    find_checkpoints,
    find_revisions,
    is_full,
    select_steps,
    within,
)
from relex_verl.offline.ingest.layout import Checkpoint, Layout, check_same_origin, check_tied
from relex_verl.offline.ingest.source import CheckpointSource
from relex_verl.pipeline.observer import Observation, Observer
from relex_verl.reporting.provenance import Checkout
from relex_verl.reporting.records import RecordError
from relex_verl.trajectory.collectors import RowCollector
from relex_verl.trajectory.hf_checkpoint import resolve_model
from relex_verl.trajectory.index import step_ranges
from relex_verl.trajectory.kinds import QUANTIZATIONS, Kind, kind_of
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

TRAJECTORIES = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Options:
    """How to ingest.

    Attributes:
        trajectory: "bf16", "fp32", or "auto": bf16 where all checkpoints are bfloat16, else fp32, so that nothing is lost.
        quantization: of fp32: "int8", "int4", "none", or "auto": none for what `relex-verl checkout` wrote (it has been
            quantised once), else int8.
        allow_pickle: use checkpoints that need unpickling.
        any_base: do not compare the weights of the first checkpoint with those of the base.

    Raises:
        IngestError: another trajectory or quantization.
    """

    trajectory: str = "auto"
    quantization: str = "auto"
    allow_pickle: bool = False
    any_base: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--trajectory", self.trajectory, TRAJECTORIES),
            ("--quantization", self.quantization, ("auto", *QUANTIZATIONS)),
        ):
            if value not in known:
                raise IngestError(f"{option} {value}: give one of {', '.join(known)}")

    def kind(self, layout: Layout, checkpoint: Path, begun: Kind | None) -> Kind:
        """The kind for checkpoints of this layout, of which one is given; `begun` is that of the steps before them.

        Raises:
            IngestError: they would be rounded because those before them were bfloat16.
        """
        trajectory, quantization = self.trajectory, self.quantization
        if begun is not None and begun.trajectory == "bf16" and trajectory == "auto" and not layout.exact_in_bf16:
            raise IngestError(
                "the steps recorded before are bfloat16, these checkpoints are not: checkpoints of one run must have one "
                "type; convert them, leave some out with --steps, or round them with --trajectory bf16"
            )
        if begun is not None:
            return begun
        checkout = _checkout(checkpoint)
        if trajectory == "auto":
            # The only exact checkouts are those of bf16; what they hold beyond it is the base's.
            exact = layout.exact_in_bf16 or (checkout is not None and checkout.max_error == 0)
            trajectory = "bf16" if exact else "fp32"
        if quantization == "auto":
            quantization = "none" if checkout is not None else "int8"
        return kind_of(trajectory, quantization)

    def allow(self, kind: Kind) -> bool:
        """Whether a trajectory that was begun as this kind may be gone on with."""
        return self.trajectory in ("auto", kind.trajectory) and (
            kind.quantization is None or self.quantization in ("auto", kind.quantization)
        )


def ingest(
    base_model: str,
    found: Sequence[Found],
    source: str,
    out: Path,
    options: Options = Options(),
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
    begun = _begun(out, base_model, source, options)
    todo = _still_to_do(found, begun.steps if begun else [], out)
    if begun and not todo:
        return begun
    # Temporary copies lie beside the trajectory: there is room for checkpoints where a run's results go, rarely in /tmp.
    workspace = next(folder for folder in out.resolve().parents if folder.is_dir())
    base = Checkpoint(resolve_model(base_model))
    with ExitStack() as opened:
        folder = opened.enter_context(todo[0].opened(options.allow_pickle, workspace))
        first = Checkpoint(folder, todo[0].called)
        layout = _common_layout(base, first, found, todo[0], options.allow_pickle)
        if begun is None and not options.any_base:
            check_same_origin(base, first, list(layout.shapes))
        kind = options.kind(layout, folder, begun.kind if begun else None)
        observer = Observer(out, base_model, layout.aliases, {"ingested_from": source}, kind)
        with _nothing_half_written(out, observer), all_processors() as threads:
            _rows(observer).threads = threads
            observer.start(CheckpointSource(base.folder, layout.shapes))
            observer.open(begun.steps[-1] if begun else 0)
            observer.reopen_base()
            _leave_to_disk(observer)
            for entry in todo:
                if entry is not todo[0]:
                    opened.close()  # of the step before
                    folder = opened.enter_context(entry.opened(options.allow_pickle, workspace))
                progress(_observe(observer, entry, Checkpoint(folder, entry.called), layout))
    return observer.trajectory


@contextmanager
def _nothing_half_written(out: Path, observer: Observer) -> Iterator[None]:
    """On an error before the first committed step, `out` is as it was; committed ones stay."""
    existed, before = out.exists(), recorded_steps(out)
    try:
        yield
    except BaseException as error:
        if not (before or observer.steps):
            shutil.rmtree(out, ignore_errors=True)
            if existed:
                out.mkdir(exist_ok=True)
        raise _in_words(error, observer.steps or before, out) from error


def recorded_steps(out: Path) -> list[int]:
    """The steps that a trajectory holds already; none where there is no trajectory."""
    return Trajectory(out).steps if (out / "index.json").exists() else []


def _observe(observer: Observer, entry: Found, checkpoint: Checkpoint, layout: Layout) -> Observation:
    layout.check(checkpoint)
    check_tied(checkpoint, layout.aliases)
    try:
        observation = observer.observe(entry.step, CheckpointSource(checkpoint.folder, layout.shapes))
    except ValueError as error:
        raise IngestError(f"{entry.called}: {error}") from error
    _leave_to_disk(observer)
    return observation


def _leave_to_disk(observer: Observer) -> None:
    """Let go of the increments that a one-process pass need not hold."""
    _rows(observer).leave_to_disk(observer.trajectory, 0)


def _rows(observer: Observer) -> RowCollector:
    assert isinstance(observer.collector, RowCollector)
    return observer.collector


def _common_layout(
    base: Checkpoint, first: Checkpoint, found: Sequence[Found], opened: Found, allow_pickle: bool
) -> Layout:
    """Check all that headers tell before anything is written; what must be merged or downloaded is checked in its turn.

    Args:
        base: the base model.
        first: the first checkpoint that is to be recorded, opened.
        found: all checkpoints.
        opened: which of them is `first`.
        allow_pickle: whether some may need unpickling.
    """
    layout = Layout.of(base, first)
    layout.check(first)
    check_tied(base, layout.aliases)
    for entry in found:
        entry.check_allowed(allow_pickle)
        if entry.kind == "safetensors" and entry is not opened:
            layout.check(Checkpoint(Path(entry.place), entry.called))
    return layout


def _checkout(folder: Path) -> Checkout | None:
    """What `relex-verl checkout` says of what it wrote, if it did: it alone says how far off its weights can be."""
    try:
        return Checkout.read(folder / "relex.json")
    except (OSError, RecordError):
        return None


def _begun(out: Path, base_model: str, source: str, options: Options) -> Trajectory | None:
    """The trajectory that `out` holds already, if it holds a step.

    Raises:
        IngestError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "index.json").exists():
        raise IngestError(f"--out {out} exists and is no trajectory: give a new folder")
    there = Trajectory(out)
    differing = {
        "base model": (there.index.base_model, base_model),
        "checkpoints": (there.index.run.get("ingested_from"), source),
    }
    for key, (theirs, ours) in differing.items():
        if theirs != ours:
            raise IngestError(
                f"--out {out} holds another trajectory ({key}: {theirs!r} there, {ours!r} here): give a new folder"
            )
    if not options.allow(there.kind):
        raise IngestError(f"--out {out} holds another trajectory (encoding {there.index.encoding}): give a new folder")
    return there if there.steps else None


def _still_to_do(found: Sequence[Found], done: Sequence[int], out: Path) -> list[Found]:
    late = [entry.step for entry in found if done and entry.step < done[-1] and entry.step not in done]
    if late:
        raise IngestError(
            f"--out {out} goes up to step {done[-1]} without step {late[0]}, and steps are added in order: "
            "give a new folder, or leave that step out with --steps"
        )
    return [entry for entry in found if entry.step not in done]


def _in_words(error: BaseException, steps: Sequence[int], out: Path) -> BaseException:
    """Out of space in words; everything with what is kept."""
    kept = f"; steps {step_ranges(steps)} are kept in {out}, run the same command again to go on" if steps else ""
    if isinstance(error, IngestError):
        return IngestError(f"{error}{kept}")
    if is_full(error):
        return IngestError(f"--out {out}: no space left on the device: make room{kept}")
    return error
