"""Score other weights with verl's own validation: what the trainer must lend, and what is kept of a validation."""

import logging
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

__all__ = ["Probe", "Validation", "ValidationTimeout", "deadline", "same_random_state"]

logger = logging.getLogger("relex_verl")


class ValidationTimeout(RuntimeError):
    """A validation took longer than `relex.validation_timeout_s`."""


@dataclass(frozen=True)
class Validation:
    """One run of verl's validation.

    Attributes:
        metrics: as verl computes them.
        metric: name of the one that is decided on.
        prompts: prompt -> score, the mean over the samples of that prompt.
        seconds: what it cost, the update of the rollout's weights included.
    """

    metrics: dict[str, float]
    metric: str
    prompts: dict[str, float]
    seconds: float

    @property
    def score(self) -> float:
        """The metric that is decided on."""
        return self.metrics[self.metric]

    def mean(self, prompts: Sequence[str]) -> float:
        """Mean score of some of the prompts."""
        return sum(self.prompts[prompt] for prompt in prompts) / len(prompts)


@dataclass
class Probe:
    """Collects what passes through verl's `_validate`, sample by sample.

    Attributes:
        inputs: prompt texts, in verl's order of samples.
        sources: data source of each sample.
        values: variable ("reward", "acc", ...) -> value of each sample.
    """

    inputs: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)

    def validation(self, metrics: Mapping[str, float], metric: str | None, seconds: float) -> Validation:
        """What is kept.

        Args:
            metrics: verl's.
            metric: the one to decide on; None for the core metric (the mean) of the first data source.
            seconds: what the validation cost.

        Raises:
            ValueError: no samples, or no such metric.
        """
        if not self.inputs:
            raise ValueError("the validation set is empty")
        source = self.sources[0]
        if metric is None:
            variable = "acc" if "acc" in self.values else "reward"
            prefix = f"val-core/{source}/{variable}/mean@"
            metric = next((name for name in metrics if name.startswith(prefix)), f"{prefix}n")
        if metric not in metrics:
            raise ValueError(f"relex.score_metric={metric} is not among the validation metrics {sorted(metrics)}")
        source, variable = metric.split("/", 1)[1].rsplit("/", 2)[:2]
        scores = defaultdict(list)
        for text, where, value in zip(self.inputs, self.sources, self.values[variable], strict=True):
            if where == source and value is not None:
                scores[text].append(float(value))
        prompts = {text: sum(values) / len(values) for text, values in scores.items()}
        return Validation({name: float(value) for name, value in metrics.items()}, metric, prompts, seconds)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `ValidationTimeout` in this thread after so many seconds. In another than the main thread: no limit."""
    if threading.current_thread() is not threading.main_thread():
        logger.warning("RELEX: relex.validation_timeout_s has no effect here (the trainer is not in the main thread)")
        yield
        return

    def expire(*_: object) -> None:
        raise ValidationTimeout(f"the validation took longer than relex.validation_timeout_s={seconds}")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Leave Python's, numpy's and torch's generators as they were: verl shuffles its validation set with torch's."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seconds_since(start: float) -> float:
    """Wall time."""
    return time.perf_counter() - start
