"""Predictions and reconstructions against the true weights: direction and length of the deltas (paper, Appendix B).

True weights are later checkpoints, or later rows of the trajectory itself; those need no weights at all, since with a the
weights of a prediction and t a row <delta_hat, delta_t> = a^T G 1_t and |delta_hat|^2 = a^T G a.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from relex_verl.maths.extrapolators import Prediction, fit_weights, top_eigenvectors
from relex_verl.maths.window import Window
from relex_verl.offline.analysis.windows import observed_until
from relex_verl.offline.ingest import Checkpoint, Found, IngestError
from relex_verl.offline.ingest.names import names_in
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

__all__ = ["Alignment", "align_checkpoints", "align_observed", "align_reconstruction"]


@dataclass(frozen=True)
class Alignment:
    """What was predicted (or reconstructed) for a step against the truth, one value a tensor.

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


def align_reconstruction(window: Window, rank: int = 1) -> list[Alignment]:
    """How well rank r gives back each observed row t (Figure 6, "reconstruction"), from G alone.

    A projection: <delta_hat, delta_t> = |delta_hat|^2 = sum_{i<=r} sigma_i^2 u_ti^2, so cosine and norm ratio are the same.
    """
    vectors_LTr, values_Lr = top_eigenvectors(window.gram_LTT, rank)
    held_LT = (vectors_LTr.square() * values_Lr.unsqueeze(1)).sum(-1)
    true_LT = window.gram_LTT.diagonal(dim1=-2, dim2=-1)
    sums_L3T = torch.stack([held_LT, held_LT, true_LT], dim=1)
    return [_alignment("reconstruction", step, sums_L3T[:, :, t]) for t, step in enumerate(window.steps)]


def align_observed(
    trajectory: Trajectory, cut: int, methods: Sequence[str], targets: Sequence[int], rank: int = 1, fit_from: int = 1
) -> list[Alignment]:
    """Predictions from the steps up to the cut against later observed steps of the same trajectory.

    Args:
        trajectory: it holds both.
        cut: last step that takes part in the fit.
        methods: names in METHODS.
        targets: observed steps after the cut.
        rank: r.
        fit_from: first step that takes part in the fit.

    Raises:
        TrajectoryError: a sketch, which does not keep single steps.
    """
    trajectory.row_codec()
    observed_until(trajectory, cut)
    everything, alignments = replay.window(trajectory), []
    gram_LTT, window = everything.gram_LTT, everything.until(cut)
    rows = window.rows
    for target in targets:
        true = trajectory.steps.index(target)
        for method in methods:
            weights_LT = fit_weights(window, Prediction(method, target, rank, fit_from))
            inner_L = torch.einsum("lt,lt->l", weights_LT, gram_LTT[:, :rows, true])
            hat_L = torch.einsum("li,lij,lj->l", weights_LT, gram_LTT[:, :rows, :rows], weights_LT).clamp_min(0.0)
            alignments.append(_alignment(method, target, torch.stack([inner_L, hat_L, gram_LTT[:, true, true]], dim=1)))
    return alignments


def align_checkpoints(
    trajectory: Trajectory,
    cut: int,
    methods: Sequence[str],
    checkpoints: Sequence[Found],
    rank: int = 1,
    fit_from: int = 1,
    allow_pickle: bool = False,
    progress: Callable[[int], None] = lambda elements: None,
) -> list[Alignment]:
    """Predictions from the steps up to the cut against true checkpoints of later steps.

    The predictions are taken before they are rounded to bfloat16, which would drown a small delta. One checkpoint and one
    tensor at a time.

    Args:
        trajectory: of one rank folder or several.
        cut: last step that takes part in the fit.
        methods: names in METHODS.
        checkpoints: the true ones.
        rank: r.
        fit_from: first step that takes part in the fit.
        allow_pickle: use checkpoints that need unpickling.
        progress: called with the elements done.
    """
    observed_until(trajectory, cut)
    window, alignments = replay.window(trajectory, cut), []
    base = trajectory.base()
    for checkpoint in checkpoints:
        fits = {}
        for method in methods:
            prediction = Prediction(method, checkpoint.step, rank, fit_from)
            trajectory.kind.check(prediction, window.steps)
            weights_LT = fit_weights(window, prediction)
            fits[method] = trajectory.kind.coefficients_of(window.names, weights_LT, window.steps)
        with checkpoint.opened(allow_pickle, base=None if trajectory.index.adapters else base) as folder:
            truth = Checkpoint(folder, checkpoint.called)
            truth.named(names_in(base, set(trajectory.names), truth).sources)
            sums = _inner_products(trajectory, cut, fits, truth, progress)
        alignments += [
            _alignment(method, checkpoint.step, torch.tensor(rows, dtype=torch.float64))
            for method, rows in sums.items()
        ]
    return alignments


def _inner_products(
    trajectory: Trajectory,
    cut: int,
    fits: Mapping[str, Mapping[str, list[float]]],
    truth: Checkpoint,
    progress: Callable[[int], None],
) -> dict[str, list[list[float]]]:
    """Method -> (L, 3): <predicted, true>, |predicted|^2, |true|^2 of the deltas."""
    for name, shape in trajectory.index.tensors.items():
        if name not in truth.entries or list(truth.entries[name].shape) != shape:
            raise IngestError(f"{truth.called} does not hold {name} of shape {shape}: it is not of this run")
    position = {name: i for i, name in enumerate(trajectory.names)}
    sums = {method: [[0.0, 0.0, 0.0] for _ in position] for method in fits}
    origins = replay.states(trajectory, trajectory.record.origin_step)
    for history, origin in zip(replay.histories(trajectory, cut), origins, strict=True):
        start, i = origin.data.double(), position[history.name]
        true_delta = truth.read(history.name, history.placement).double() - start
        for method, coefficients in fits.items():
            fit = (history.anchor, history.parts, coefficients[history.name])
            delta = trajectory.kind.of(history.name).accumulate(*fit, torch.float64) - start
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
