"""Score other weights with verl's own validation: what is kept of a validation, and how one that hangs is given up."""

import logging
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from relex_verl.run.validation import Validation, ValidationTimeout

__all__ = ["LEAST_COVERAGE", "Probe", "deadline", "same_random_state"]

logger = logging.getLogger("relex_verl")

# Share of the prompts whose samples must all have come back. verl drops what fails in the rollout or the reward, and a
# test on the survivors of one of the two validations says nothing of the weights.
LEAST_COVERAGE = 0.95


@dataclass
class Probe:
    """Collects what passes through verl's `_validate`, sample by sample.

    Attributes:
        first_source: data source of the first row of the validation set.
        inputs: prompt texts, in verl's order of samples.
        uids: verl's identifier of each sample's prompt, new in every validation.
        sources: data source of each sample.
        values: variable ("reward", "acc", ...) -> value of each sample.
        expected: (data source, uid) -> number of samples asked for, also of prompts that never came back, in the order in
            which the rows left the dataloader.
        marks: what to add to the text of each row, in that order, so that it names the row; see `rows.WatchedRows`.
        places: of each row among all of the validation set, in that order; where not given, they are all of them.
    """

    first_source: str
    inputs: list[str] = field(default_factory=list)
    uids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)
    expected: dict[tuple[str, str], int] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def see(
        self, sources: Any, uids: Any, values: Mapping[str, Any], expected: Mapping[tuple[str, str], int] | None
    ) -> None:
        """Take what verl makes its metrics of."""
        self.sources, self.uids = [str(source) for source in sources], [str(uid) for uid in uids]
        self.values = {name: list(of_samples) for name, of_samples in values.items()}
        self.expected = dict(expected or {})

    def validation(self, metrics: Mapping[str, float], metric: str | None, seconds: float) -> Validation:
        """What is kept.

        Args:
            metrics: verl's.
            metric: the one to decide on; None for the core metric (the mean) of the first data source.
            seconds: what the validation cost.

        Raises:
            ValueError: no samples, too few of them, or no such metric.
        """
        if not self.inputs:
            raise ValueError("no validation sample came back")
        if metric is None:
            metric = core_metric(metrics, self.first_source)
        if metric is None:
            source = self.first_source
            raise ValueError(f"verl has no core metric of data source {source!r} among {sorted(metrics)}")
        if metric not in metrics:
            raise ValueError(f"relex.score_metric={metric} is not among the validation metrics {sorted(metrics)}")
        source, variable = metric.split("/", 1)[1].rsplit("/", 2)[:2]
        if variable not in self.values:
            raise ValueError(f"relex.score_metric={metric}: no sample carries {variable}")
        values = {name: float(value) for name, value in metrics.items()}
        samples, places = self._samples(source, variable)
        return Validation(values, metric, samples, seconds, sum(self.expected.values()), places)

    def _samples(self, source: str, variable: str) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        """Prompt -> score of each sample, and the places of its rows."""
        scores: dict[str, list[float]] = defaultdict(list)
        texts: dict[str, str] = {}
        for text, uid, where, value in zip(self.inputs, self.uids, self.sources, self.values[variable], strict=True):
            if where == source and value is not None:
                scores[uid].append(float(value))
                texts[uid] = text
        wanted = {uid: samples for (where, uid), samples in self.expected.items() if where == source}
        whole = [uid for uid, samples in wanted.items() if len(scores[uid]) >= samples]
        if len(whole) < LEAST_COVERAGE * len(wanted):
            raise ValueError(f"only {len(whole)} of the {len(wanted)} validation prompts of {source} came back whole")
        if len(self.marks) != len(self.expected):
            raise ValueError(f"{len(self.marks)} rows left the dataloader, verl asked for {len(self.expected)} prompts")
        mark_of = {uid: mark for (_, uid), mark in zip(self.expected, self.marks, strict=True)}
        places = self.places or range(len(self.expected))
        place_of = {uid: place for (_, uid), place in zip(self.expected, places, strict=True)}
        by_prompt: dict[str, list[float]] = defaultdict(list)
        rows: dict[str, list[int]] = defaultdict(list)
        for uid in whole:
            by_prompt[texts[uid] + mark_of[uid]] += scores[uid]  # a prompt may stand in the set twice
            rows[texts[uid] + mark_of[uid]].append(place_of[uid])
        return dict(by_prompt), dict(rows)


def core_metric(metrics: Mapping[str, float], source: str) -> str | None:
    """verl's core metric of a data source: the mean of "acc" where that source has it, else of "reward"; None for none."""
    # A source may have slashes in its name, and one may begin like another.
    pattern = re.compile(rf"val-core/{re.escape(source)}/(acc|reward)/mean@\d+")
    return next((name for name in metrics if pattern.fullmatch(name)), None)


@contextmanager
def deadline(buffer: Any, seconds: float) -> Iterator[Callable[[], None]]:
    """Give up a validation that takes longer, whenever verl looks whether samples have come.

    There and nowhere else: between two looks nothing but generation and rewards is under way, while an interruption in
    the middle of a weight update would leave the ranks in a collective (and a signal does not interrupt `ray.get`).

    Args:
        buffer: verl's replay buffer, whose wait between two looks is shadowed on this one object.
        seconds: from now on.

    Yields:
        A check to be called in other loops that wait.
    """
    until = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > until:
            raise ValidationTimeout(f"the validation took longer than relex.validation_timeout_s={seconds:g}")

    if not hasattr(buffer, "_wait_for_next_poll"):
        logger.warning(
            "RELEX: relex.validation_timeout_s has no effect with the replay buffer %s", type(buffer).__name__
        )
        yield check
        return
    wait = buffer._wait_for_next_poll

    def wait_until(*args: Any, **kwargs: Any) -> Any:
        check()
        return wait(*args, **kwargs)

    buffer._wait_for_next_poll = wait_until
    try:
        yield check
    finally:
        buffer._wait_for_next_poll = wait


@contextmanager
def same_random_state(loader: Any) -> Iterator[None]:
    """Leave Python's, numpy's and torch's generators as they were, and the one that a dataloader is shuffled with.

    Args:
        loader: verl's of the validation set, whose sampler draws on from one validation to the next.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    shuffler = getattr(getattr(loader, "sampler", None), "generator", None)
    shuffled = shuffler.get_state() if shuffler else None
    try:
        yield
    finally:
        if shuffler:
            shuffler.set_state(shuffled)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
