"""Predicted checkpoints on disk: one, or a grid with a manifest. No folder is filled with another prediction than it had."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import Prediction
from relex_verl.offline.analysis.windows import observed_until
from relex_verl.offline.merging import write_merged
from relex_verl.pipeline.prediction import extrapolate, write_checkpoint
from relex_verl.reporting.provenance import Provenance, versions
from relex_verl.reporting.records import RecordError
from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["sweep", "write_prediction"]


def write_prediction(
    trajectory: Trajectory,
    shards: Iterable[TensorShard],
    folder: Path,
    provenance: Provenance,
    progress: Callable[[int], None] = lambda elements: None,
    merge: bool = False,
) -> Path:
    """Write a predicted checkpoint, unless its folder holds a prediction that was made otherwise.

    A folder's name says the method and the step only, not the rank, the cut and so on.

    Args:
        trajectory: what it is predicted from.
        shards: every shard of every rank.
        folder: the destination.
        provenance: for `relex.json`.
        progress: called with the number of elements of each shard written.
        merge: of LoRA: full weights instead of the adapters.

    Raises:
        ValueError: another prediction is there; a weight beyond the range of its type.
    """
    cure = "give another --out, or remove it"
    try:
        there = _provenance_in(folder)
    except RecordError as error:
        raise ValueError(f"{folder} holds something else than this prediction ({error}): {cure}") from None
    differing = there.differing(provenance) if there is not None else []
    if differing:
        key, theirs, ours = differing[0]
        raise ValueError(f"{folder} holds another prediction ({key} {theirs!r} there, {ours!r} here): {cure}")
    if there is not None and trajectory.index.adapters and (folder / "adapter_config.json").exists() == merge:
        raise ValueError(f"{folder} holds this prediction {'without' if merge else 'with'} --merge: {cure}")
    shards = iter(shards)
    first = list(islice(shards, 1))  # what cannot be fitted says so here, before a folder is made for it
    folder.parent.mkdir(parents=True, exist_ok=True)
    write = write_merged if merge else write_checkpoint
    return write(trajectory, _finite(chain(first, shards)), folder, provenance.to_json(), progress=progress)


def _finite(shards: Iterable[TensorShard]) -> Iterator[TensorShard]:
    """The same; an error where a far target leads a weight beyond the range of its type."""
    for shard in shards:
        if not shard.data.isfinite().all():
            raise ValueError(
                f"{shard.name}: the prediction is not finite in {str(shard.data.dtype).removeprefix('torch.')}: the run has "
                "diverged, or the target is too far. Give a nearer one, or an earlier cut"
            )
        yield shard


def sweep(
    trajectory: Trajectory,
    cuts: Sequence[int],
    targets: Sequence[int],
    methods: Sequence[str],
    out: Path,
    rank: int = 1,
    fit_from: int = 1,
    progress: Callable[[str, int], None] = lambda title, elements: None,
) -> list[dict[str, Any]]:
    """Write the prediction of every method, cut and later target (paper, Table 3), and `manifest.json` that lists them.

    The manifest names what is complete at any time: a sweep that was interrupted goes on where it stopped.

    Args:
        trajectory: where to predict from.
        cuts: last steps of the fits.
        targets: steps to predict; those not after a cut are left out for it.
        methods: names in METHODS.
        out: gets cut_<K>/<method>-step_<N>/ and manifest.json.
        rank: r.
        fit_from: first step that takes part in the fits.
        progress: called with the folder's name and the elements written.

    Returns:
        The manifest's predictions: path (from the manifest's folder), method, rank, fit_from, t_cut, target.

    Raises:
        TrajectoryError: a cut beyond what was observed.
        ValueError: two cuts that see the same steps; a folder holds another prediction.
    """
    rows_of = _distinct(trajectory, cuts)
    out.mkdir(parents=True, exist_ok=True)
    predictions: list[dict[str, Any]] = []
    for cut, method, target in product(rows_of, methods, targets):
        if target <= cut:
            continue
        prediction = Prediction(method, target, rank, fit_from)
        folder, place = out / f"cut_{cut}" / prediction.folder_name, trajectory.folder.resolve()
        facts = (prediction, trajectory.index.base_model, cut, rows_of[cut], place, trajectory.number)
        provenance = Provenance.of(*facts)
        advance = partial(progress, f"cut {cut}, {prediction.folder_name}")
        if _is_complete(folder, provenance):
            advance(trajectory.elements)
        else:
            write_prediction(trajectory, extrapolate(trajectory, cut, prediction), folder, provenance, advance)
        row = {"path": str(folder.relative_to(out)), "method": method, "rank": rank, "fit_from": fit_from}
        predictions.append({**row, "t_cut": cut, "target": target})
        _write_manifest(out, trajectory, predictions)
    return predictions


def _distinct(trajectory: Trajectory, cuts: Sequence[int]) -> dict[int, list[int]]:
    """The observed steps of each cut; an error where two see the same."""
    rows_of: dict[int, list[int]] = {}
    for cut in cuts:
        steps = observed_until(trajectory, cut)
        other = next((other for other, seen in rows_of.items() if seen == steps), None)
        if other is not None:
            raise ValueError(
                f"--t-cut {other} and {cut} see the same observed steps, the last of them {steps[-1]}: give one"
            )
        rows_of[cut] = steps
    return rows_of


def _write_manifest(out: Path, trajectory: Trajectory, predictions: Sequence[Mapping[str, Any]]) -> None:
    facts = {"base_model": trajectory.index.base_model, "trajectory": str(trajectory.folder.resolve())}
    write_json(out / "manifest.json", {**facts, "versions": versions(), "predictions": list(predictions)})


def _is_complete(folder: Path, provenance: Provenance) -> bool:
    try:
        there = _provenance_in(folder)
    except RecordError:
        return False
    return there is not None and not there.differing(provenance)


def _provenance_in(folder: Path) -> Provenance | None:
    """What `relex.json` in a folder says; None where there is none."""
    try:
        return Provenance.read(folder / "relex.json")
    except OSError:
        return None
