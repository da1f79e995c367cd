"""The paper's non-linear ablation: a 3-layer Transformer that continues the rank-1 coefficients of all tensors.

Wei et al. 2026, Section 4.3 and Table 2, https://arxiv.org/abs/2605.21468, which says no more than "a 3-layer neural network
(Transformer) trained to model the trajectory directly"; we found no code of it, so all that follows is our reading.

With G = U S^2 U^T of a tensor, c_t = s_1 u_1[t] as in RELEX. The Transformer sees the speed of the coefficient,
r_t = (c_t - c_{t-1}) / (step_t - step_{t-1}) with c = 0 at the origin, divided by its root mean square and turned so
that c ends positive; it learns to predict r_{t+1} from r_1 .. r_t (causal attention, nearer rows weigh more), one network
for all tensors. Rolled out with its own outputs as inputs until the target, it gives c_hat, and the prediction is
theta_0 + c_hat v_1, that is the weight vector a = u_1 c_hat / s_1. With speeds over real steps, a straight trajectory is
constant input and output, wherever its rows lie.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from relex_verl.maths.extrapolators import top_eigenvectors
from relex_verl.maths.window import Window
from relex_verl.pipeline.prediction import weighted_tensors
from relex_verl.trajectory import replay
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["TransformerFit", "TransformerSettings", "fit_coefficients", "transformer_tensors", "transformer_weights"]

MIN_ROWS = 3
NEARNESS = 0.1  # attention falls by this much (in logits) a row of distance


@dataclass(frozen=True)
class TransformerSettings:
    """Size and training of the network; only the number of layers is the paper's.

    Attributes:
        layers: of the encoder.
        width: of its hidden states.
        heads: of its attention.
        epochs: of full-batch training.
        learning_rate: of AdamW; falls to 0 along a cosine.
        seed: of the initial weights.
    """

    layers: int = 3
    width: int = 64
    heads: int = 4
    epochs: int = 300
    learning_rate: float = 1e-3
    seed: int = 0


class TransformerFit(NamedTuple):
    """A prediction.

    Attributes:
        coefficients_L: c_hat of each tensor at the target, (L,) float64.
        first_loss, last_loss: mean squared error of the next speed over the training set, before and after training.
    """

    coefficients_L: torch.Tensor
    first_loss: float
    last_loss: float


class _NextSpeed(nn.Module):
    """r_1 .. r_t -> r_2 .. r_{t+1}."""

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            settings.width, settings.heads, 4 * settings.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.embed = nn.Linear(1, settings.width)
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.head = nn.Linear(settings.width, 1)

    def forward(self, speeds_LT: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(speeds_LT.shape[1], dtype=speeds_LT.dtype)
        distance_TT = rows.unsqueeze(1) - rows
        mask_TT = torch.where(distance_TT >= 0, -NEARNESS * distance_TT, float("-inf"))
        return self.head(self.encoder(self.embed(speeds_LT.unsqueeze(-1)), mask=mask_TT)).squeeze(-1)


def fit_coefficients(
    coefficients_LT: torch.Tensor,
    steps: Sequence[int],
    target: float,
    origin: int = 0,
    settings: TransformerSettings | None = None,
) -> TransformerFit:
    """Train on the coefficients of all tensors and roll out to the target in strides of the median gap between rows.

    Args:
        coefficients_LT: c, (L, T); a row of zeros (a tensor that never moved) takes no part and stays at 0.
        steps: the T observed steps, ascending.
        target: step to predict, after the last.
        origin: the step of theta_0.
        settings: the defaults when None.

    Raises:
        ValueError: fewer than three rows, a target that is not after the last, or no tensor that moved.
    """
    settings = settings or TransformerSettings()
    if len(steps) < MIN_ROWS:
        raise ValueError(f"the Transformer needs {MIN_ROWS} observed steps, got {list(steps)}")
    if target <= steps[-1]:
        raise ValueError(f"the target {target} has to be after the last observed step, {steps[-1]}")
    gaps_T = torch.tensor([origin, *steps], dtype=torch.float64).diff()
    speeds_LT = torch.cat([coefficients_LT[:, :1], coefficients_LT.diff(dim=1)], dim=1).double() / gaps_T
    scale_L1 = speeds_LT.square().mean(dim=1, keepdim=True).sqrt()
    scale_L1 = torch.where(coefficients_LT[:, -1:] < 0, -scale_L1, scale_L1)
    moved_L = scale_L1.squeeze(1) != 0
    if not moved_L.any():
        raise ValueError("no tensor has moved: there is nothing to continue")
    inputs_LT = (speeds_LT[moved_L] / scale_L1[moved_L]).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = _NextSpeed(settings)
    first, last = _train(network, inputs_LT, settings)
    stride = float(median(gaps_T.tolist()))
    change_L = torch.zeros(len(coefficients_LT), dtype=torch.float64)
    change_L[moved_L] = _roll_out(network, inputs_LT, stride, target - steps[-1]) * scale_L1[moved_L].squeeze(1)
    return TransformerFit(coefficients_LT[:, -1].double() + change_L, first, last)


def transformer_weights(window: Window, target: float, settings: TransformerSettings | None = None) -> torch.Tensor:
    """a = u_1 c_hat / s_1 of every tensor, 0 where nothing moved.

    Args:
        window: the rows.
        target: step to predict.
        settings: the defaults when None.

    Returns:
        (L, T) float64.

    Raises:
        ValueError: as `fit_coefficients`.
    """
    vectors_LT1, values_L1 = top_eigenvectors(window.gram_LTT, rank=1)
    sigma_L1, vectors_LT = values_L1.sqrt(), vectors_LT1.squeeze(-1)
    fit = fit_coefficients(vectors_LT * sigma_L1, window.steps, target, window.origin_step, settings)
    weights_LT = vectors_LT * fit.coefficients_L.unsqueeze(1) / sigma_L1
    return torch.where(sigma_L1 > 0, weights_LT, 0.0)


def transformer_tensors(
    trajectory: Trajectory, cut: int, target: int, settings: TransformerSettings | None = None
) -> Iterator[TensorShard]:
    """theta_0 + c_hat v_1 of every shard, from the steps up to the cut; one shard in memory.

    Args:
        trajectory: an open trajectory.
        cut: no step after this one is used.
        target: step to predict.
        settings: the defaults when None.

    Yields:
        Every shard, in the base's types, computed in float64.

    Raises:
        TrajectoryError: too few steps up to the cut.
        ValueError: a target that is not after them.
    """
    steps = trajectory.steps_until(cut)
    if len(steps) < MIN_ROWS:
        raise TrajectoryError(f"the Transformer needs {MIN_ROWS} observed steps up to {cut}, there are {steps}")
    trajectory.row_codec()
    window = replay.window(trajectory, cut)
    weights_LT = transformer_weights(window, target, settings)
    return weighted_tensors(replay.histories(trajectory, cut), trajectory.kind, window, weights_LT)


def _train(network: _NextSpeed, speeds_LT: torch.Tensor, settings: TransformerSettings) -> tuple[float, float]:
    """Full-batch AdamW on the squared error of the next speed."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, settings.epochs))
    losses: list[float] = []
    for epoch in range(settings.epochs + 1):
        loss = (network(speeds_LT[:, :-1]) - speeds_LT[:, 1:]).square().mean()
        losses.append(loss.item())
        if epoch < settings.epochs:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return losses[0], losses[-1]


@torch.no_grad()
def _roll_out(network: _NextSpeed, speeds_LT: torch.Tensor, stride: float, distance: float) -> torch.Tensor:
    """The sum of predicted speeds times strides over the distance; the window keeps the length of training."""
    window_LT, travelled_L = speeds_LT, torch.zeros(len(speeds_LT), dtype=torch.float64)
    while distance > 0:
        window_LT = window_LT[:, 1 - speeds_LT.shape[1] :]
        speed_L = network(window_LT)[:, -1]
        travelled_L += speed_L.double() * min(stride, distance)
        window_LT = torch.cat([window_LT, speed_L.unsqueeze(1)], dim=1)
        distance -= stride
    return travelled_L
