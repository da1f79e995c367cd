"""What a trajectory shows: Algorithm 1, backtests, alignment with true later checkpoints, and grids of predictions.

Plain numbers and checkpoints come out; the commands print and draw them.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from relex_verl import replay, tracking
from relex_verl.diagnostics import backtest_error, backtest_ratio
from relex_verl.extrapolators import METHODS, fit_weights, reconstruction_weights
from relex_verl.hf_checkpoint import BaseCheckpoint, write_json
from relex_verl.ingest import Found, IngestError
from relex_verl.ingest.layout import open_checkpoint
from relex_verl.plots import Spread
from relex_verl.prediction import Prediction, check_method, extrapolate, write_checkpoint
from relex_verl.shards import TensorShard
from relex_verl.trajectory import Trajectory, TrajectoryError

__all__ = ["Alignment", "backtests", "compare", "defined", "reconstruct", "reconstruction_alignment", "spread", "sweep"]


def spread(x: float, values: Sequence[float] | torch.Tensor, middle: str = "median") -> Spread | None:
    """Median (or mean) and 10th to 90th percentile over the tensors for which a value is defined; None if none is."""
    values_L = torch.as_tensor(values, dtype=torch.float64)
    values_L = values_L[values_L.isfinite()]
    if not len(values_L):
        return None
    low, median, high = values_L.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Spread(x, values_L.mean().item() if middle == "mean" else median, low, high)


def reconstruct(trajectory: Trajectory, step: int, rank: int, cut: int | None = None) -> Iterator[TensorShard]:
    """Rank-r reconstruction of an observed step: theta_0 + (U_r U_r^T M)_step (paper, Algorithm 1), in bfloat16.

    Args:
        trajectory: its steps up to `cut` span the directions.
        step: an observed step.
        rank: r.
        cut: last step that takes part; all of them for None.

    Raises:
        TrajectoryError: the step was not observed, or lies after the cut.
    """
    steps = trajectory.steps_until(cut)
    if step not in steps:
        raise TrajectoryError(f"--step {step} is not among the {len(steps)} observed steps {steps[0]} to {steps[-1]}")
    weights_LT = reconstruction_weights(replay.gram(trajectory, cut), steps.index(step), rank)
    coefficients_LK = trajectory.encoding.coefficients(weights_LT, steps)
    coefficients = dict(zip(trajectory.names, coefficients_LK.tolist(), strict=True))
    accumulate = trajectory.encoding.accumulate
    return (
        TensorShard(one.name, one.shape, one.placement, accumulate(one.anchor, one.parts, coefficients[one.name]))
        for one in replay.histories(trajectory, cut)
    )


def backtests(
    gram_LTT: torch.Tensor, steps: Sequence[int], methods: Sequence[str], rank: int = 1
) -> list[dict[str, Any]]:
    """Fit on every prefix, predict the last row, compare with holding the prefix's last row; a row a method and prefix.

    Args:
        gram_LTT: G, (L, T, T).
        steps: the T real step numbers.
        methods: names in METHODS.
        rank: r.

    Returns:
        Keys: method, rows, prefix (its last step), target, error (of the whole model), median, p10, p90 (over tensors).
    """
    rows = []
    for method in methods:
        for prefix in range(max(1, METHODS[method].min_rows), len(steps)):
            over_tensors = spread(0.0, backtest_error(gram_LTT, steps, prefix, method, rank))
            if over_tensors is None:
                continue
            row = {"method": method, "rows": prefix, "prefix": steps[prefix - 1], "target": steps[-1]}
            row["error"] = backtest_ratio(gram_LTT, steps, prefix, method, rank)
            rows.append({**row, "median": over_tensors.middle, "p10": over_tensors.low, "p90": over_tensors.high})
    return rows


@dataclass(frozen=True)
class Alignment:
    """A prediction against the true checkpoint of its step (paper, Appendix B), one value a tensor.

    Attributes:
        method, step: what was predicted.
        cosine: of the predicted to the true delta; NaN where one of them is 0.
        ratio: |predicted delta| / |true delta|.
        model_cosine, model_ratio: of all tensors taken as one vector.
    """

    method: str
    step: int
    cosine: list[float]
    ratio: list[float]
    model_cosine: float
    model_ratio: float


def reconstruction_alignment(gram_LTT: torch.Tensor, steps: Sequence[int], rank: int = 1) -> list[Alignment]:
    """How well rank r gives back each observed row t (Figure 6, "reconstruction"), from G (L, T, T) alone.

    With a the weights of row t: <delta_hat, delta_t> = a^T G 1_t and |delta_hat|^2 = a^T G a.
    """
    found = []
    for row, step in enumerate(steps):
        weights_LT = reconstruction_weights(gram_LTT, row, rank)
        inner_L = torch.einsum("lt,lt->l", weights_LT, gram_LTT[:, :, row])
        hat_L = torch.einsum("li,lij,lj->l", weights_LT, gram_LTT, weights_LT).clamp_min(0.0)
        true_L = gram_LTT[:, row, row]
        found.append(_alignment("reconstruction", step, torch.stack([inner_L, hat_L, true_L], dim=1)))
    return found


def compare(
    trajectory: Trajectory,
    cut: int,
    methods: Sequence[str],
    checkpoints: Sequence[Found],
    rank: int = 1,
    allow_pickle: bool = False,
    progress: Callable[[int], None] = lambda elements: None,
) -> list[Alignment]:
    """Predict each true checkpoint's step from the steps up to the cut, and measure direction and length of the deltas.

    The predictions are taken before they are rounded to bfloat16, which would drown a small delta. One checkpoint and one
    tensor at a time.

    Args:
        trajectory: of one rank folder or several.
        cut: last step that takes part in the fit.
        methods: names in METHODS.
        checkpoints: the true ones, of later steps.
        rank: r.
        allow_pickle: use checkpoints that need unpickling.
        progress: called with the elements done.
    """
    steps, gram_LTT = trajectory.steps_until(cut), replay.gram(trajectory, cut)
    found = []
    for checkpoint in checkpoints:
        fits = {}
        for method in methods:
            check_method(trajectory.encoding, Prediction(method, checkpoint.step, rank), steps)
            weights_LT = fit_weights(gram_LTT, steps, checkpoint.step, method, rank)
            fits[method] = trajectory.encoding.coefficients(weights_LT, steps).tolist()
        with checkpoint.opened(allow_pickle) as folder:
            sums = _inner_products(trajectory, cut, fits, open_checkpoint(folder), progress)
        found += [
            _alignment(method, checkpoint.step, torch.tensor(rows, dtype=torch.float64))
            for method, rows in sums.items()
        ]
    return found


def _inner_products(
    trajectory: Trajectory,
    cut: int,
    fits: Mapping[str, list[list[float]]],
    truth: BaseCheckpoint,
    progress: Callable[[int], None],
) -> dict[str, list[list[float]]]:
    """Method -> (L, 3): <predicted, true>, |predicted|^2, |true|^2 of the deltas."""
    for name, shape in trajectory.index.tensors.items():
        if name not in truth.entries or list(truth.entries[name].shape) != shape:
            raise IngestError(f"{truth.folder} does not hold {name} of shape {shape}: it is not of this run")
    position = {name: i for i, name in enumerate(trajectory.names)}
    sums = {method: [[0.0, 0.0, 0.0] for _ in position] for method in fits}
    origins = replay.states(trajectory, trajectory.window.origin_step)
    for history, origin in zip(replay.histories(trajectory, cut), origins, strict=True):
        start, i = origin.data.double(), position[history.name]
        true_delta = truth.read(history.name, history.placement).double() - start
        for method, coefficients_LK in fits.items():
            fit = (history.anchor, history.parts, coefficients_LK[i])
            delta = trajectory.encoding.accumulate(*fit, torch.float64) - start
            products = (delta @ true_delta, delta @ delta, true_delta @ true_delta)
            sums[method][i] = [old + float(new) for old, new in zip(sums[method][i], products, strict=True)]
        progress(history.placement.numel)
    return sums


def _alignment(method: str, step: int, sums_L3: torch.Tensor) -> Alignment:
    def figures(inner: torch.Tensor, hat: torch.Tensor, true: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return inner / (hat * true).sqrt(), (hat / true).sqrt()

    cosine_L, ratio_L = figures(*sums_L3.double().unbind(1))
    model_cosine, model_ratio = figures(*sums_L3.double().sum(0))
    ratio_L = torch.where(ratio_L.isfinite(), ratio_L, torch.nan)
    return Alignment(method, step, cosine_L.tolist(), ratio_L.tolist(), model_cosine.item(), model_ratio.item())


def sweep(
    trajectory: Trajectory,
    cuts: Sequence[int],
    targets: Sequence[int],
    methods: Sequence[str],
    out: Path,
    rank: int = 1,
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
        progress: called with the folder's name and the elements written.

    Returns:
        The manifest's predictions: path (from the manifest's folder), method, rank, t_cut, target.
    """
    out.mkdir(parents=True, exist_ok=True)
    predictions: list[dict[str, Any]] = []
    for cut in cuts:
        steps = trajectory.steps_until(cut)
        for method in methods:
            for target in (target for target in targets if target > cut):
                prediction = Prediction(method, target, rank)
                folder = out / f"cut_{cut}" / prediction.folder_name
                facts = tracking.provenance(trajectory.index.base_model, prediction, cut, steps, trajectory.folder)
                if not _is_complete(folder, facts):
                    folder.parent.mkdir(exist_ok=True)
                    shards = extrapolate(trajectory, cut, prediction)
                    advance = partial(progress, f"cut {cut}, {prediction.folder_name}")
                    write_checkpoint(trajectory, shards, folder, facts, progress=advance)
                row = {"path": str(folder.relative_to(out)), "method": method, "rank": rank}
                predictions.append({**row, "t_cut": cut, "target": target})
                _write_manifest(out, trajectory, predictions)
    return predictions


def _write_manifest(out: Path, trajectory: Trajectory, predictions: Sequence[Mapping[str, Any]]) -> None:
    facts = {"base_model": trajectory.index.base_model, "trajectory": str(trajectory.folder)}
    write_json(out / "manifest.json", {**facts, "versions": tracking.versions(), "predictions": list(predictions)})


def _is_complete(folder: Path, facts: Mapping[str, Any]) -> bool:
    try:
        written = json.loads((folder / "relex.json").read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return all(written.get(key) == value for key, value in facts.items() if key != "versions")


def defined(values: Sequence[float]) -> list[float | None]:
    """NaN and infinity as None: JSON has neither."""
    return [value if math.isfinite(value) else None for value in values]
