"""A simulated run's validations: prompts of known difficulty, answered by weights whose true gain is known."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import numpy as np

from relex_verl.run.protocol import Weights
from relex_verl.run.validation import Validation

__all__ = ["METRIC", "World", "flat", "rising"]

METRIC = "val-core/simulated/acc/mean@1"
# How much other weights change a prompt's odds, as the standard deviation of its logit.
SPREAD = 0.5

# Horizon, in windows from the origin (1 is the cut) -> gain in accuracy over the observed weights.
Curve = Callable[[float], float]


def flat(gain: float) -> Curve:
    """Every prediction gains the same: 0 is the null of all tests."""
    return lambda horizon: gain


def rising(gain: float) -> Curve:
    """The shape of the study's curves over the logarithm of the horizon: a peak at 4 windows, nothing at 16, then a fall."""
    return lambda horizon: gain * (1 - (np.log2(horizon / 4) / 2) ** 2)


@dataclass(frozen=True)
class World:
    """How prompts and answers come about.

    Attributes:
        rows: of the validation set.
        curve: true gain of a prediction over the observed weights.
        samples: answers a prompt.
        cluster: prompts that other weights change alike, as those of one template.
        repeats: how often each prompt stands in the validation set.
        levels: rewards above 0: 1 is right or wrong, 4 is credit in quarters.
    """

    rows: int
    curve: Curve
    samples: int = 1
    cluster: int = 1
    repeats: int = 1
    levels: int = 1

    def host(self, seed: int) -> "SimulatedHost":
        """The trainer of one run."""
        return SimulatedHost(self, np.random.default_rng(seed))


class SimulatedHost:
    """Stands in for the trainer, as far as `decide` asks it: each validation draws weights, and answers of them."""

    relex_rewards: ClassVar[dict[int, float]] = {}

    def __init__(self, world: World, generator: np.random.Generator) -> None:
        self.world, self.generator = world, generator
        self.window = (0, 1)  # origin and cut of the coming decision
        prompts = world.rows // world.repeats
        self.texts = [f"{generator.integers(2**62)}:{i}" for i in range(prompts)]
        self.difficulty = np.log(1 / generator.beta(0.7, 0.7, prompts).clip(1e-3, 1 - 1e-3) - 1)

    def gain(self, weights: Weights) -> float:
        """True gain of some weights over the observed ones."""
        if isinstance(weights, str):
            return 0.0
        origin, cut = self.window
        return float(self.world.curve((weights.target - origin) / (cut - origin)))

    def relex_validate(self, weights: Weights, metric: str | None, timeout: float, places: None = None) -> Validation:
        """A validation; the observed weights and predictions without gain are drawn from one distribution."""
        world, prompts = self.world, len(self.texts)
        changes = np.repeat(self.generator.normal(0, SPREAD, -(-prompts // world.cluster)), world.cluster)[:prompts]
        chance = _with_gain(1 / (1 + np.exp(self.difficulty + changes)), self.gain(weights))
        answers = world.samples * world.repeats  # rows of one text are one prompt, as in verl's validation
        scores = self.generator.binomial(world.levels, chance[:, None], (prompts, answers)) / world.levels
        samples = dict(zip(self.texts, scores.tolist(), strict=True))
        return Validation({METRIC: fmean(map(fmean, samples.values()))}, METRIC, samples, 0.0)


def _with_gain(chance: np.ndarray, gain: float) -> np.ndarray:
    """Chances moved towards right (or wrong) so that their mean is higher by the gain, as far as there is room."""
    if gain >= 0:
        return chance + (1 - chance) * min(1.0, gain / float((1 - chance).mean()))
    return chance * max(0.0, 1 + gain / float(chance.mean()))
