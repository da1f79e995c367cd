"""AlphaRL: partial least squares between each matrix's top singular vectors and the scores of its checkpoints.

Cai et al., "On Predictability of Reinforcement Learning Dynamics for Large Language Models", ICLR 2026,
https://arxiv.org/abs/2510.00553, code https://github.com/caiyuchen-ustc/AlphaRL.

For each attention and MLP matrix, D_t = W_t - W_0 has the top singular triple (u_t, s_t, v_t). With x_t = s_t u_t (signs
aligned from the last checkpoint backwards) and y_t the score of checkpoint t, PLS with one component gives a latent
coordinate z_t of x_t and a line y = a z + b. The wanted score y* is put back through both: z* = (y* - b) / a, and x* is
z* in the coordinates of x. Prediction: W_0 + x* v_T^T, v_T of the last checkpoint.

Differences from the authors' code: it adds x* v_T^T to the weights of the *last checkpoint*, although x* is fitted to deltas
from the base, so that most of the update counts twice. Their paper speaks of the base, and so does the default here;
`add_to="last"` does as their code does.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from relex_verl.offline.baselines.rank_one import RankOne, differences
from relex_verl.offline.baselines.whole_tensors import WholeTensors, is_attention_or_mlp_matrix
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

__all__ = ["aligned_backwards", "alpharl", "invert_pls"]

MIN_CHECKPOINTS = 3  # two points lie on every line


def aligned_backwards(factors: Sequence[RankOne]) -> list[RankOne]:
    """Flip each triple so that cos(u_t, u_{t+1}) >= 0, from the last one, which stays as it is, backwards."""
    aligned = list(factors[-1:])
    for factor in reversed(factors[:-1]):
        aligned.append(factor.flipped() if factor.left @ aligned[-1].left < 0 else factor)
    return aligned[::-1]


def invert_pls(vectors_Tm: np.ndarray, scores_T: np.ndarray, wanted: float) -> np.ndarray:
    """The vector that PLS with one component connects with the wanted score.

    X and y are centred, and X's columns scaled to unit variance (scikit-learn's default, which the authors use). Then
    w = X^T y / |X^T y|, z = X w, loadings p = X^T z / z^T z, and y = a z + b by least squares; the answer is
    p (y* - b) / a in X's own units.

    Args:
        vectors_Tm: x_t, (T, m).
        scores_T: y_t, (T,).
        wanted: y*.

    Returns:
        x*, (m,) float64. If no column varies with the score, the mean vector.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.cross_decomposition import PLSRegression
    except ImportError as error:
        raise ImportError("AlphaRL needs scikit-learn: pip install 'relex-verl[baselines]'") from error
    covariance = (vectors_Tm - vectors_Tm.mean(axis=0)).T @ (scores_T - scores_T.mean())
    if not np.any(covariance):
        return np.asarray(vectors_Tm.mean(axis=0))
    pls = PLSRegression(n_components=1).fit(vectors_Tm, scores_T)
    latent_T = pls.transform(vectors_Tm)[:, 0]
    slope, intercept = np.polyfit(latent_T, scores_T, 1)
    return np.asarray(pls.inverse_transform(np.array([[(wanted - intercept) / slope]]))[0])


def alpharl(
    trajectory: Trajectory,
    cut: int,
    scores: Mapping[int, float],
    wanted: float,
    add_to: Literal["base", "last"] = "base",
) -> Iterator[TensorShard]:
    """The checkpoint at which PLS expects the wanted score; all other tensors stay as in the one that is added to.

    Time: one top singular triple for each matrix and scored step. Memory: one tensor at two steps, T vectors of its height.

    Args:
        trajectory: an open trajectory.
        cut: no step after this one is used.
        scores: step -> score, for the observed steps that take part; higher or lower being better is all the same.
        wanted: y*, in the same unit; the authors extrapolate to about 1.7 times the last one.
        add_to: "base" as in the paper, "last" as in the authors' code.

    Yields:
        Every tensor, whole, float32.

    Raises:
        ValueError: fewer than three scored steps up to the cut, a score of a step that was not observed, scores that are all
            the same or not finite, or a model without attention and MLP matrices.
    """
    reader = WholeTensors(trajectory, cut)
    steps = _scored_steps(reader, scores)
    if not any(is_attention_or_mlp_matrix(name, shape) for name, shape in reader.shapes.items()):
        raise ValueError("no tensor's name says that it is a matrix of an attention or MLP block")
    return _predicted(reader, steps, np.array([scores[step] for step in steps]), wanted, add_to)


def _scored_steps(reader: WholeTensors, scores: Mapping[int, float]) -> list[int]:
    unknown = sorted(step for step in scores if step not in reader.trajectory.steps)
    if unknown:
        raise ValueError(f"there is a score of step {unknown[0]}, which was not observed; observed: {reader.steps}")
    steps = [step for step in reader.steps if step in scores]
    if len(steps) < MIN_CHECKPOINTS:
        raise ValueError(f"AlphaRL needs scores of {MIN_CHECKPOINTS} observed steps up to the cut, got {steps}")
    values = [scores[step] for step in steps]
    if not np.isfinite(values).all() or len(set(values)) == 1:
        raise ValueError(f"AlphaRL regresses on the scores: they have to be finite and to differ, got {values}")
    return steps


def _predicted(
    reader: WholeTensors, steps: list[int], scores_T: np.ndarray, wanted: float, add_to: str
) -> Iterator[TensorShard]:
    start = reader.origin_step if add_to == "base" else steps[-1]
    for name, shape in reader.shapes.items():
        weights = reader.state(name, start).float()
        if is_attention_or_mlp_matrix(name, shape):
            by_pair = differences(reader.states(name), [(reader.origin_step, step) for step in steps])
            factors = aligned_backwards([by_pair[reader.origin_step, step] for step in steps])
            vectors_Tm = torch.stack([factor.left.double() * factor.value for factor in factors]).numpy()
            predicted_m = torch.from_numpy(invert_pls(vectors_Tm, scores_T, wanted)).float()
            weights += torch.outer(predicted_m, factors[-1].right)
        yield reader.shard(name, weights)
