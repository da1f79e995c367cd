"""One validation of some weights: its metrics, and the score of every prompt and sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from statistics import fmean, stdev

__all__ = ["RolloutSilent", "Validation", "ValidationTimeout"]


class RolloutSilent(RuntimeError):
    """The rollout has not come back within `relex.rollout_timeout_s`: nobody there answers any more, nor do the ranks."""


class ValidationTimeout(RuntimeError):
    """A validation took longer than `relex.validation_timeout_s`."""


@dataclass(frozen=True)
class Validation:
    """One run of verl's validation.

    Attributes:
        metrics: as verl computes them.
        metric: name of the one that is decided on.
        samples: prompt -> score of each of its samples; only prompts whose samples all came back.
        seconds: what it cost, the update of the rollout's weights included.
        asked_for: samples that were to be generated, those of other data sources and those that never came back included;
            None where they are no more than `samples`.
        places: prompt -> its rows' places in the validation set, by which it can be asked for alone.
    """

    metrics: dict[str, float]
    metric: str
    samples: dict[str, list[float]]
    seconds: float
    asked_for: int | None = None
    places: dict[str, list[int]] = field(default_factory=dict)

    @property
    def generated(self) -> int:
        """How many samples it cost."""
        return sum(map(len, self.samples.values())) if self.asked_for is None else self.asked_for

    @property
    def score(self) -> float:
        """The metric that is decided on."""
        return self.metrics[self.metric]

    @cached_property
    def prompts(self) -> dict[str, float]:
        """Prompt -> score, the mean over its samples."""
        return {prompt: fmean(scores) for prompt, scores in self.samples.items()}

    def with_more(self, other: "Validation") -> "Validation":
        """Together with another one of the same weights, on other prompts. Of the metrics only the deciding one is left."""
        samples = self.samples | other.samples
        score = fmean(fmean(scores) for scores in samples.values())
        seconds, generated = self.seconds + other.seconds, self.generated + other.generated
        return Validation({self.metric: score}, self.metric, samples, seconds, generated, self.places | other.places)

    def places_of(self, prompts: Sequence[str]) -> set[int]:
        """Places of their rows in the validation set.

        Raises:
            KeyError: the host has not told them.
        """
        return {place for prompt in prompts for place in self.places[prompt]}

    def mean(self, prompts: Sequence[str]) -> float:
        """Mean score of those of the prompts that came back."""
        return fmean(self.prompts[prompt] for prompt in prompts if prompt in self.prompts)

    def standard_error(self, prompts: Sequence[str] | None = None) -> float:
        """Standard error of the mean score, from its spread over the prompts (all by default); 0 for a single one."""
        chosen = self.prompts if prompts is None else [prompt for prompt in prompts if prompt in self.prompts]
        scores = [self.prompts[prompt] for prompt in chosen]
        return stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else 0.0
