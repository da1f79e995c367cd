"""The interface of collectors, and what goes in and out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from relex_verl.maths.window import Window
from relex_verl.trajectory.encodings import MixedStep, PackedStep
from relex_verl.trajectory.shards import Placement
from relex_verl.trajectory.store import Trajectory

__all__ = ["ALL", "Collector", "Held", "Taken", "check_later", "naming"]

ALL = slice(None)


@dataclass
class Held:
    """A shard that this rank is the one to count.

    Attributes:
        shape: of the whole tensor.
        placement: which of its elements these are.
        state: (n,) on the host, in its kind's dtype: the weights at the last row; theta_0 for a sketch.
    """

    shape: tuple[int, ...]
    placement: Placement
    state: torch.Tensor


class Taken(NamedTuple):
    """What one step gave on this rank.

    Attributes:
        figures_lk: (l, k) float64, a row for each tensor held; summed over the ranks they say something of the whole.
        changed_l: (l,) elements whose change since the row before was not 0; NaN where no row before is kept.
        file: to be written for this step; None when nothing is.
    """

    figures_lk: torch.Tensor
    changed_l: torch.Tensor
    file: PackedStep[Any] | MixedStep | None


@contextmanager
def naming(held: Mapping[str, Held], position: int) -> Iterator[None]:
    """An error about a shard's weights says which tensor it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{list(held)[position]}: {error}") from error


def check_later(step: int, steps: Sequence[int]) -> None:
    """Rows ascend: nothing can be predicted from, or read again, where a step comes twice or a counter jumps back.

    Raises:
        ValueError: it is not after the steps before.
    """
    if steps and step <= steps[-1]:
        raise ValueError(f"step {step} comes after step {steps[-1]} was observed: the run's steps do not ascend")


class Collector(Protocol):
    """What every collector does; see the package's docstring.

    Attributes:
        held: name -> shard, in the order in which the engine hands them out.
        steps: the observed steps.
    """

    held: dict[str, Held]
    steps: list[int]

    def begin(self, held: dict[str, Held], tensors: int) -> None:
        """Start a window with nothing: the shards of this rank at theta_0, and the number of tensors of all ranks."""

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what a step and a cut will run, after `begin`; the engine's weights are of this type, on the host."""

    def resume(self, trajectory: Trajectory, rank: int, step: int) -> None:
        """Go on after `begin` with what a trajectory holds of the window after `step`."""

    def take(self, step: int, shards: Iterator[tuple[int, Held, torch.Tensor]]) -> Taken:
        """Look at the weights of this step: (position among the tensors held, shard, its weights now), in order."""

    def keep(self, step: int, figures_Lk: torch.Tensor) -> None:
        """The step counts: `figures_lk` summed over the ranks, a row for each tensor."""

    def snapshot(self) -> PackedStep[Any] | None:
        """All that is kept, to be written now; None where every step has written its own file."""

    def window(self, names: Sequence[str], origin_step: int, of: slice = ALL) -> Window:
        """The rows; smoothed to polynomials for a sketch.

        Args:
            names: of the tensors of all ranks.
            origin_step: the training step of theta_0.
            of: those that are wanted.
        """

    def parts(self, position: int) -> list[Any]:
        """What `Kind.accumulate` adds up, for the tensor at this position among those held."""

    def bytes_of_tensors(self) -> torch.Tensor:
        """Bytes of each tensor held, besides the states, (l,) float64; on disk the same."""
