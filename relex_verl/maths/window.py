"""A window: what is known of a stretch of observed steps that start from one origin.

Methods, diagnostics and reports take it. Its rows are deltas from its own origin, delta_t = theta_t - theta_0, where theta_0
are the weights at the origin step: a run's first window starts at step 0, from the base model, a later one need not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

__all__ = ["Window"]


@dataclass(frozen=True, eq=False)
class Window:
    """G of L tensors over T observed steps, and where the steps count from.

    Attributes:
        names: of the L tensors, in the order of the stack.
        steps: the T real training steps of the rows, ascending, all after the origin step.
        gram_LTT: G = M M^T, (L, T, T) float64 (paper, section 2.2); of smoothed rows for a sketch.
        origin_step: the training step of theta_0.
        sketched_energy_L: sum_t |delta_t|^2, (L,), where G is that of a sketch: its trace leaves some of it out. None where
            the rows themselves are known.

    Raises:
        ValueError: shapes, or steps that do not ascend from the origin.
    """

    names: Sequence[str]
    steps: Sequence[int]
    gram_LTT: torch.Tensor = field(repr=False)
    origin_step: int = 0
    sketched_energy_L: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        wanted = (len(self.names), len(self.steps), len(self.steps))
        if tuple(self.gram_LTT.shape) != wanted:
            raise ValueError(f"G has shape {tuple(self.gram_LTT.shape)}, {wanted} tensors and steps are named")
        if sorted({self.origin_step, *self.steps}) != [self.origin_step, *self.steps]:
            raise ValueError(f"steps must ascend from the origin at {self.origin_step}, got {list(self.steps)}")

    @property
    def rows(self) -> int:
        """T."""
        return len(self.steps)

    @property
    def distances(self) -> list[int]:
        """How far each row is from the origin, in steps."""
        return [step - self.origin_step for step in self.steps]

    @property
    def smoothed(self) -> bool:
        """Whether G is that of a sketch, whose rows say nothing of how straight the real ones are."""
        return self.sketched_energy_L is not None

    @property
    def energy_L(self) -> torch.Tensor:
        """sum_t |delta_t|^2 of the rows themselves, (L,)."""
        if self.sketched_energy_L is not None:
            return self.sketched_energy_L
        return self.gram_LTT.diagonal(dim1=-2, dim2=-1).sum(-1)

    @property
    def moved_L(self) -> torch.Tensor:
        """Which tensors have moved at all, (L,) bool."""
        return self.gram_LTT.diagonal(dim1=-2, dim2=-1).sum(-1) > 0

    def until(self, step: int) -> "Window":
        """The rows up to a step.

        Raises:
            ValueError: none is left; a sketch, whose rows are smoothed by later ones, would lose some.
        """
        return self._rows(0, sum(row <= step for row in self.steps), f"up to step {step}")

    def since(self, step: int) -> "Window":
        """The rows from a step on, from the same origin: a warm-up takes no part in a fit.

        Raises:
            ValueError: none is left; a sketch cannot leave out what it has added up.
        """
        return self._rows(sum(row < step for row in self.steps), self.rows, f"from step {step} on")

    def select(self, positions: Sequence[int]) -> "Window":
        """Some of the tensors.

        Args:
            positions: in the stack, in the order wanted.
        """
        energy_L = None if self.sketched_energy_L is None else self.sketched_energy_L[list(positions)]
        names = [self.names[i] for i in positions]
        return replace(self, names=names, gram_LTT=self.gram_LTT[list(positions)], sketched_energy_L=energy_L)

    def _rows(self, start: int, stop: int, what: str) -> "Window":
        if (start, stop) == (0, self.rows):
            return self
        if start >= stop:
            raise ValueError(f"no row is left {what}: the observed steps are {self.steps[0]} to {self.steps[-1]}")
        if self.smoothed:
            raise ValueError(f"a sketch cannot leave out steps that it holds, {self.steps[0]} to {self.steps[-1]}")
        return replace(self, steps=self.steps[start:stop], gram_LTT=self.gram_LTT[:, start:stop, start:stop])
