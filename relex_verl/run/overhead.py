"""What observing costs the training: the share of its time in which it waits for a row."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from relex_verl.run.schedule import Schedule

__all__ = ["Overhead"]

logger = logging.getLogger("relex_verl")

STEPS = 10


class Overhead:
    """Watches whether that share stays within `relex.max_overhead`, over 10 steps in a row."""

    def __init__(self, most: float | None) -> None:
        """Nothing is measured yet.

        Args:
            most: the share that is allowed; None for any.
        """
        self._most = most
        self._steps: deque[tuple[float, float]] = deque(maxlen=STEPS)  # seconds waited, and in all
        self._last: float | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """The end of a training step: the training waits inside."""
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        if self._last is not None:
            self._steps.append((ended - began, ended - self._last))
        self._last = ended

    def forget(self) -> None:
        """Measure anew: a cut has come between, or rows have become rarer."""
        self._steps.clear()
        self._last = None

    @property
    def share(self) -> float | None:
        """Of the last 10 steps' time; None while there are fewer."""
        if len(self._steps) < STEPS:
            return None
        waited, whole = (sum(seconds) for seconds in zip(*self._steps, strict=True))
        return waited / whole

    def bearable(self, schedule: Schedule) -> bool:
        """Have rows become rarer where that share is too high, and say so; False where they cannot any more."""
        if self._most is None or self.share is None or self.share <= self._most:
            return True
        cost = f"observing took {self.share:.1%} of the last steps' time, more than relex.max_overhead={self._most:g}"
        every = schedule.thin_out()
        if every is not None:
            logger.warning("RELEX: %s: from here on it observes every %d steps", cost, every)
        else:
            logger.warning("RELEX: %s, rare as rows have become: it observes no further", cost)
        self.forget()
        return every is not None
