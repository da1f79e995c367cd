"""Which run, and which of its steps stand in the figures: the paper's shares of its 500 steps."""

from dataclasses import dataclass
from functools import cached_property

PAPER_STEPS = 500
CUTS = (50, 75, 100, 125)
TARGETS = (200, 300, 400, 500, 750, 1000)
ALIGNED_CUT = 75  # of Figure 6
POINTS = 10  # of Figure 2, and of Figure 6 over the run


@dataclass(frozen=True)
class Design:
    """One run.

    Attributes:
        steps: that it trains.
        validate_every: steps between two of its own validations.
    """

    steps: int
    validate_every: int

    @cached_property
    def cuts(self) -> list[int]:
        """Of the table's rows."""
        return sorted({max(3, self._at(cut)) for cut in CUTS})  # a line and its diagnostics need three rows

    @cached_property
    def targets(self) -> list[int]:
        """Of the table's columns."""
        return [self._at(target) for target in TARGETS]

    @property
    def aligned_cut(self) -> int:
        """What the predictions of Figure 6 are fitted on."""
        return max(3, self._at(ALIGNED_CUT))

    @cached_property
    def points(self) -> list[int]:
        """Steps that are reconstructed and compared: a tenth of the run apart, the last one among them."""
        return sorted({max(1, round(self.steps * i / POINTS)) for i in range(1, POINTS + 1)})

    def _at(self, step: int) -> int:
        return round(step * self.steps / PAPER_STEPS)


FULL = Design(steps=200, validate_every=10)
QUICK = Design(steps=20, validate_every=2)
