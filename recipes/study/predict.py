"""Predictions of one recorded prefix, many at a time, and how near they come to the run's own later weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from relex_verl.maths.extrapolators import Prediction, fit_weights
from relex_verl.maths.window import Window
from relex_verl.pipeline.prediction import extrapolate
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

Wanted = tuple[str, int]  # method, target


@dataclass(frozen=True)
class Prefix:
    """A trajectory up to a cut, with its deltas expanded (the product never does that; here the model is tiny).

    Attributes:
        window: the T rows, with G from the trajectory's own inner products.
        origins: theta_0 of each, (n,) float64.
        deltas: delta_t = theta_t - theta_0 of each, (T, n) float64, replayed from the increments.
    """

    window: Window
    origins: list[torch.Tensor]
    deltas: list[torch.Tensor]

    def first_rows(self, rows: int) -> "Prefix":
        """The same, cut after fewer rows."""
        deltas = [delta_Tn[:rows] for delta_Tn in self.deltas]
        return Prefix(self.window.until(self.window.steps[rows - 1]), self.origins, deltas)

    def chosen_rows(self, steps: Sequence[int]) -> "Prefix":
        """The same, as if only these steps had been observed."""
        window = self.window
        rows = [list(window.steps).index(step) for step in steps]
        deltas = [delta_Tn[rows] for delta_Tn in self.deltas]
        chosen = replace(window, steps=list(steps), gram_LTT=window.gram_LTT[:, rows][:, :, rows])
        return Prefix(chosen, self.origins, deltas)


def load_prefix(trajectory: Trajectory, cut: int) -> Prefix:
    """Replay a trajectory of one rank up to a cut."""
    steps = trajectory.steps_until(cut)
    placements = trajectory.placements(0)
    packed = [trajectory.load(0, step) for step in steps]
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    origins = trajectory.origin(0, trajectory.base(), placements)
    for i, name in enumerate(placements):
        origin = origins[name]
        state, delta_Tn = origin.clone(), torch.empty(len(steps), len(origin), dtype=torch.float64)
        for t, one in enumerate(packed):
            trajectory.row_codec().advance(state, one.increment(i))
            torch.sub(state.double(), origin.double(), out=delta_Tn[t])
        found[name] = origin.double(), delta_Tn
    begins, deltas = zip(*(found[name] for name in trajectory.names), strict=True)
    return Prefix(replay.window(trajectory, cut), list(begins), list(deltas))


def predicted_deltas(prefix: Prefix, wanted: Sequence[Wanted]) -> list[torch.Tensor]:
    """theta_hat - theta_0 = sum_t a_t delta_t for every tensor, (K, n) float64, one row a wanted prediction."""
    weights_LKT = torch.stack(
        [fit_weights(prefix.window, Prediction(method, target)) for method, target in wanted], dim=1
    )
    return [weights_KT @ delta_Tn for weights_KT, delta_Tn in zip(weights_LKT, prefix.deltas, strict=True)]


@dataclass(frozen=True)
class Agreement:
    """Means over the tensors for which both deltas are not 0."""

    cosine: float
    norm_ratio: float


def agreement(predicted: Sequence[torch.Tensor], true: Sequence[torch.Tensor]) -> Agreement:
    """Cosine, and |predicted| / |true|, of the deltas of each tensor.

    Args:
        predicted: (n,) float64 a tensor, before rounding to bfloat16.
        true: (n,) a tensor, of the float32 master weights.
    """
    cosines, ratios = [], []
    for guess, truth in zip(predicted, true, strict=True):
        guess_norm, truth_norm = guess.norm().item(), truth.norm().item()
        if guess_norm > 0 and truth_norm > 0:
            cosines.append(torch.dot(guess, truth.double()).item() / guess_norm / truth_norm)
            ratios.append(guess_norm / truth_norm)
    if not cosines:
        return Agreement(float("nan"), float("nan"))
    return Agreement(sum(cosines) / len(cosines), sum(ratios) / len(ratios))


def share_equal_to_product(trajectory: Trajectory, cut: int, prefix: Prefix, wanted: Wanted) -> float:
    """Share of the bfloat16 weights in which a prediction made here equals `relex_verl.pipeline.prediction.extrapolate`."""
    deltas = dict(zip(prefix.window.names, predicted_deltas(prefix, [wanted]), strict=True))
    origins = dict(zip(prefix.window.names, prefix.origins, strict=True))
    equal = total = 0
    for shard in extrapolate(trajectory, cut, Prediction(*wanted)):
        here = (origins[shard.name] + deltas[shard.name][0]).to(torch.bfloat16)
        equal += int((here == shard.data).sum())
        total += len(here)
    return equal / total
