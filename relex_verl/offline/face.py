"""What can be done with a finished run, a function each: notebooks call them, and the commands of `relex-verl`.

They are what `relex_verl` itself gives: `from relex_verl import ingest, extrapolate, reconstruct, diagnose`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import METHODS, Prediction
from relex_verl.offline import analysis
from relex_verl.offline.ingest import Options, checkpoints_in, select_steps
from relex_verl.offline.ingest import ingest as ingest_checkpoints
from relex_verl.pipeline import prediction as predicting
from relex_verl.reporting.metrics import fit_report
from relex_verl.reporting.provenance import Provenance
from relex_verl.trajectory.store import Trajectory

__all__ = ["Diagnosis", "diagnose", "extrapolate", "ingest", "reconstruct"]

Folder = str | PathLike[str]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Diagnosis:
    """How low-rank and how straight the path of each tensor is (the paper's Findings 1 and 2).

    Attributes:
        steps: the observed steps that take part.
        tensors: a row for each: `tensor`, `shape`, `delta_norm` (of its last delta) and the figures `explained_variance`,
            `line_r2`, `spectral_gap`, `drift`; None where one is not defined, as for a tensor that never moved.
            `pandas.DataFrame(diagnosis.tensors)` is a table of them.
        summary: figure -> mean, p10 and min over the tensors; empty where it is defined for none.
        random_walk: figure -> what directionless noise shows over the same steps. Explained variance and R^2 say little
            without it.
    """

    steps: list[int]
    tensors: list[dict[str, Any]]
    summary: dict[str, dict[str, float]]
    random_walk: dict[str, float]


def ingest(
    base: Folder,
    checkpoints: Folder,
    out: Folder,
    steps: str | Iterable[int] | None = None,
    *,
    revisions: str = "step_{N}",
    trajectory: str = "auto",
    quantization: str = "auto",
    allow_pickle: bool = False,
    any_base: bool = False,
    accept_jump: bool = False,
    step_pattern: str | None = None,
) -> Trajectory:
    """Record the checkpoints of a finished run as a trajectory, in one pass; interrupted, the same call goes on.

    >>> ingest("base", "run", out="first", steps="1-4").steps
    [1, 2, 3, 4]

    Args:
        base: folder or Hub id of the model that the run started from.
        checkpoints: folder with a folder for each step, like global_step_5 or checkpoint-5; or "hub:owner/name", a Hub
            repository whose revisions, or folders, are steps.
        out: folder of the trajectory.
        steps: which, e.g. "1-75,80" or range(1, 76); all if not given.
        revisions: how those of a Hub repository are named.
        trajectory: "bf16", "fp32", or "auto": bf16 for bfloat16 checkpoints, fp32 for others.
        quantization: of fp32: "int8", "int4", "none", or "auto": none for what `relex-verl checkout` wrote, else int8.
        allow_pickle: use *.bin and verl's *.pt files (weights_only=True).
        any_base: accept a base that lies over 3 % away from the first checkpoint.
        accept_jump: accept a checkpoint that lies much further away than those before it.
        step_pattern: how the steps' folders are named, where that is not found out, e.g. "run/epoch_{N}/weights".

    Raises:
        IngestError: a checkpoint that cannot be used, another trajectory in `out`, no space. Committed steps stay.
        FileNotFoundError: no base model.
    """
    options = Options(trajectory, quantization, allow_pickle, any_base, accept_jump)
    place = str(checkpoints)
    hub = place.removeprefix("hub:") if place.startswith("hub:") else None
    found, source = checkpoints_in(Path(place) if hub is None else None, hub, revisions, step_pattern)
    chosen = steps if steps is None or isinstance(steps, str) else ",".join(map(str, steps))
    return ingest_checkpoints(str(base), select_steps(found, chosen), source, Path(out), options)


def extrapolate(
    trajectory: Trajectory | Folder,
    target: int,
    t_cut: int | None = None,
    method: str = "relex",
    rank: int = 1,
    *,
    out: Folder,
    fit_from: int = 1,
    window: int | None = None,
    merge: bool = False,
    progress: Progress = lambda elements: None,
) -> Path:
    """Predict the checkpoint of a later step from the trajectory alone, as a Hugging Face checkpoint with `relex.json`.

    A good fit does not mean a good checkpoint: score it against the last observed one before you use it.

    >>> extrapolate(trajectory, 40, t_cut=4, method="two-point", out="predictions").name
    'two-point-step_40'

    Args:
        trajectory: open, or its folder.
        target: the step to predict.
        t_cut: fit on the observed steps up to this one; all of them for None.
        method: a name in METHODS.
        rank: directions kept for each tensor; the paper uses 1.
        out: gets <method>-step_<target>/.
        fit_from: first step that takes part in the fit: leaves a warm-up out.
        window: of a run that jumped, from 0; None for the one that is open, of a folder the last.
        merge: of LoRA: full weights instead of the adapters.
        progress: called with the number of elements of each shard written.

    Returns:
        The checkpoint's folder.

    Raises:
        TrajectoryError: nothing was observed up to the cut, or the cut lies beyond what was.
        ValueError: no such method, too few steps for it, a target not after the cut; the folder holds another prediction.
    """
    opened = _opened(trajectory, window)
    observed = analysis.observed_until(opened, t_cut)
    cut = observed[-1] if t_cut is None else t_cut
    if method not in METHODS:
        raise ValueError(f"method {method}: give one of {', '.join(METHODS)}")
    if target <= cut:
        raise ValueError(f"target {target} is not after t_cut {cut}: give a later step, or cut earlier")
    prediction = Prediction(method, target, rank, fit_from)
    place = opened.folder.resolve()
    facts = Provenance.of(prediction, opened.index.base_model, cut, observed, place, opened.number)
    shards = predicting.extrapolate(opened, cut, prediction)
    return analysis.write_prediction(opened, shards, Path(out) / prediction.folder_name, facts, progress, merge)


def reconstruct(
    trajectory: Trajectory | Folder,
    step: int,
    rank: int = 1,
    *,
    out: Folder,
    t_cut: int | None = None,
    window: int | None = None,
    progress: Progress = lambda elements: None,
) -> Path:
    """Rank-r reconstruction of an observed checkpoint (the paper's Algorithm 1), as a Hugging Face checkpoint.

    If it scores like the checkpoint itself, those directions hold what the run learned.

    >>> reconstruct(trajectory, step=6, rank=2, out="rank_2").name
    'rank_2'

    Args:
        trajectory: open, or its folder.
        step: an observed step.
        rank: directions kept for each tensor.
        out: folder of the checkpoint.
        t_cut: take the directions from the steps up to this one; from all of them for None.
        window: which window's steps, see `extrapolate`.
        progress: called with the number of elements of each shard written.

    Returns:
        `out`.

    Raises:
        TrajectoryError: the step was not observed, or lies after the cut.
    """
    opened = _opened(trajectory, window)
    observed = analysis.observed_until(opened, t_cut)
    facts = Provenance.of_reconstruction(
        step, rank, opened.index.base_model, observed, opened.folder.resolve(), opened.number
    ).to_json()
    shards = analysis.reconstruct(opened, step, rank, t_cut)
    return predicting.write_checkpoint(opened, shards, Path(out), facts, progress=progress)


def diagnose(
    trajectory: Trajectory | Folder,
    t_cut: int | None = None,
    *,
    rank: int = 1,
    fit_from: int = 1,
    window: int | None = None,
) -> Diagnosis:
    """How low-rank and how straight each tensor's path is, beside what a pure random walk shows. No weights are read.

    >>> diagnose(trajectory, t_cut=4).steps
    [1, 2, 3, 4]

    Args:
        trajectory: open, or its folder. Of a sketch only the explained variance is known.
        t_cut: the observed steps up to this one; all of them for None.
        rank: directions counted in the explained variance.
        fit_from: first step that takes part.
        window: which window's steps, see `extrapolate`.

    Raises:
        TrajectoryError: nothing was observed up to the cut, or the cut lies beyond what was; no step is left.
    """
    opened = _opened(trajectory, window)
    rows = analysis.window(opened, t_cut, fit_from)
    shapes = [opened.index.tensors[name] for name in opened.names]
    fits = fit_report(rows, shapes, rank)
    return Diagnosis(list(rows.steps), fits.tensors, fits.summary, fits.random_walk_null)


def _opened(trajectory: Trajectory | Folder, window: int | None) -> Trajectory:
    opened = trajectory if isinstance(trajectory, Trajectory) else Trajectory(trajectory)
    return opened if window is None else opened.of_window(window)
