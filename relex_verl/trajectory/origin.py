"""theta_0 of a window, as a rank holds it: elements of the base model, or a copy of its own."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import Kind
from relex_verl.trajectory.shards import Placement

__all__ = ["Origin"]


class Origin:
    """A rank's part of theta_0, read from disk tensor by tensor: origin[name] is (n,) in the kind's dtype."""

    def __init__(
        self, base: BaseCheckpoint, placements: Mapping[str, Placement], stored: Path | None, kind: Kind
    ) -> None:
        """Args: the base, what the rank holds, the file of its own copy where theta_0 is not the base, and the kind."""
        self._base, self._placements, self._stored, self._kind = base, placements, stored, kind
        ends = accumulate(placement.numel for placement in placements.values())
        self._end = dict(zip(placements, ends, strict=True))

    def __getitem__(self, name: str) -> torch.Tensor:
        placement = self._placements[name]
        if self._stored is None:
            return self._base.read(name, placement).to(self._kind.of(name).dtype)
        with safe_open(self._stored, framework="pt") as handle:
            return handle.get_slice("origin")[self._end[name] - placement.numel : self._end[name]]

    def check(self) -> None:
        """Whether a copy is there, and whole.

        Raises:
            TrajectoryError: it is not.
        """
        if self._stored is None:
            return
        numel = max(self._end.values(), default=0)
        try:
            with safe_open(self._stored, framework="pt") as handle:
                shape = handle.get_slice("origin").get_shape()
        except Exception as error:
            raise TrajectoryError(f"{self._stored} cannot be read: {error}") from error
        if shape != [numel]:
            raise TrajectoryError(f"{self._stored} holds {shape} elements, not {[numel]}")
