"""Predicted checkpoints on disk: one, or a grid with a manifest. No folder is filled with another prediction than it had."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from relex_verl.maths.extrapolators import Prediction
from relex_verl.offline.analysis.windows import observed_until
from relex_verl.pipeline.prediction import extrapolate, write_checkpoint
from relex_verl.reporting.provenance import provenance, versions
from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["sweep", "write_prediction"]


def write_prediction(
    trajectory: Trajectory,
    shards: Iterable[TensorShard],
    folder: Path,
    facts: Mapping[str, Any],
    progress: Callable[[int], None] = lambda elements: None,
) -> Path:
    """Write a predicted checkpoint, unless its folder holds a prediction that was made otherwise.

    A folder's name says the method and the step only, not the rank, the cut and so on.

    Args:
        trajectory: what it is predicted from.
        shards: every shard of every rank.
        folder: the destination.
        facts: for `relex.json`.
        progress: called with the number of elements of each shard written.

    Raises:
        ValueError: another prediction is there.
    """
    there, here = _facts_in(folder), json.loads(json.dumps(facts))  # as JSON has them
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key) and key != "versions"]
    if there and differing:
        key = differing[0]
        raise ValueError(
            f"{folder} holds another prediction ({key} {there.get(key)!r} there, {here.get(key)!r} here): give another "
            "--out, or remove it"
        )
    shards = iter(shards)
    first = list(islice(shards, 1))  # what cannot be fitted says so here, before a folder is made for it
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(trajectory, chain(first, shards), folder, facts, progress=progress)


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
        facts = provenance(trajectory.index.base_model, prediction, cut, rows_of[cut], place)
        advance = partial(progress, f"cut {cut}, {prediction.folder_name}")
        if _is_complete(folder, facts):
            advance(trajectory.elements)
        else:
            write_prediction(trajectory, extrapolate(trajectory, cut, prediction), folder, facts, advance)
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


def _is_complete(folder: Path, facts: Mapping[str, Any]) -> bool:
    there = _facts_in(folder)
    return bool(there) and all(there.get(key) == value for key, value in facts.items() if key != "versions")


def _facts_in(folder: Path) -> dict[str, Any]:
    """What `relex.json` in a folder says; nothing where there is none."""
    try:
        return dict(json.loads((folder / "relex.json").read_text()))
    except (OSError, ValueError):
        return {}
