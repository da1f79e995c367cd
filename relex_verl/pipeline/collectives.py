"""The only file that calls torch.distributed. Without a process group, or with one rank, every call is local."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Collectives", "PeerError"]


class PeerError(RuntimeError):
    """Another rank failed; its own log holds the traceback."""


class Collectives:
    """The ranks of one process group. Work beside the training wants a group of its own: two threads must not share one."""

    def __init__(self, group: Any = None) -> None:
        """Take the ranks of a group.

        Args:
            group: of torch.distributed; None for the default one, once that is there.
        """
        self._group = group

    def of_their_own(self) -> "Collectives":
        """The same ranks in another group, on the host, for a thread beside the training. Collective."""
        return self if self.world_size == 1 else Collectives(dist.new_group(backend="gloo"))

    @property
    def rank(self) -> int:
        """This process's rank, 0 without a process group."""
        return dist.get_rank(self._group) if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        """Number of ranks, 1 without a process group."""
        return dist.get_world_size(self._group) if dist.is_initialized() else 1

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of this host tensor over all ranks, the same bits on each of them."""
        if self.world_size == 1:
            return tensor
        # verl's group is "cpu:gloo,cuda:nccl"; a group without a host backend wants the tensor on its device.
        on_host = "cpu" in dist.get_backend_config(self._group)
        device = torch.device("cpu") if on_host else torch.accelerator.current_accelerator()
        total = tensor.to(device, copy=True)
        dist.all_reduce(total, group=self._group)
        return total.cpu()

    def merge(self, parts: torch.Tensor) -> torch.Tensor:
        """Put a tensor together of which every rank has filled some elements and left the others 0; bits are kept.

        Args:
            parts: (n,) contiguous, of any type, on the host or the device; overwritten.

        Returns:
            The whole tensor, on each rank.
        """
        if self.world_size > 1:
            dist.all_reduce(parts.view(torch.uint8), group=self._group)  # each byte is non-zero on one rank at most
        return parts

    def gather(self, item: Any) -> list[Any]:
        """Every rank's (picklable) item, in the order of ranks, on each of them."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def all_or_nothing(self, error: BaseException | None) -> None:
        """End a phase of work on all ranks together: returns when all succeeded, raises on each when one failed.

        A rank that raised on its own would leave the others waiting in their next collective, and the training with them.

        Args:
            error: what this rank caught, or None.

        Raises:
            BaseException: the error of this rank.
            PeerError: another rank's.
        """
        failed = self.sum_over_ranks(torch.tensor([0.0 if error is None else 1.0], dtype=torch.float64))
        if error is not None:
            raise error
        if failed.item():
            raise PeerError(f"{int(failed.item())} of {self.world_size} ranks failed in RELEX; their logs say why")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A phase that ends on all ranks together: one rank's error is raised on each. No collective call inside."""
        try:
            yield
        except Exception as error:
            self.all_or_nothing(error)
        else:
            self.all_or_nothing(None)
