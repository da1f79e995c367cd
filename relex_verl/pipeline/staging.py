"""A copy of the weights in host memory: training waits for it alone, and goes on while the step is worked on."""

import weakref
from collections.abc import Collection, Iterator, Mapping

import torch

from relex_verl.pipeline.engine_shards import counted, exhausted
from relex_verl.trajectory.collectors import Held
from relex_verl.trajectory.shards import ShardSource, TensorShard

__all__ = ["Staging"]


class Staging:
    """A `ShardSource`: the shards that this rank counts, as they were at the last `copy`.

    One block of host memory for all of them, in the type in which they are followed: rounded here, they have the bits that
    they would have been rounded to there.
    """

    def __init__(self, held: Mapping[str, Held], tensors: Collection[str], dtype: torch.dtype) -> None:
        """Take the memory.

        Args:
            held: what this rank counts.
            tensors: names of what all ranks count.
            dtype: of the states.
        """
        sizes = [len(shard.state) for shard in held.values()]
        block = torch.empty(sum(sizes), dtype=dtype)
        self._held, self._tensors, self._pieces = held, tensors, block.split(sizes)
        if torch.cuda.is_available() and block.nbytes:
            _pin(self, block)

    def copy(self, source: ShardSource) -> None:
        """Take the weights as they are now. Collective, as far as the source is.

        Raises:
            ValueError: the engine cuts or orders its weights otherwise; a tensor has appeared or is gone.
        """
        _settle()  # weights that the host has just moved out of the device are whole from here on
        with exhausted(source) as shards:
            for i, _, data in counted(shards, self._held, self._tensors):
                self._pieces[i].copy_(data, non_blocking=True)
        _settle()

    def __iter__(self) -> Iterator[TensorShard]:
        for (name, held), data in zip(self._held.items(), self._pieces, strict=True):
            yield TensorShard(name, held.shape, held.placement, data)


def _pin(owner: object, block: torch.Tensor) -> None:
    """Have a CUDA device copy into this memory by itself. `pin_memory=True` would take up to twice as much of it: torch's
    allocator rounds pinned memory up to a power of two."""
    library = torch.cuda.cudart()
    if int(library.cudaHostRegister(block.data_ptr(), block.nbytes, 0)) == 0:
        weakref.finalize(owner, library.cudaHostUnregister, block.data_ptr())


def _settle() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
