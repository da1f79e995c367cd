"""A copy of the weights in host memory: training waits for it alone, and goes on while the step is worked on."""

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
        """Take the memory; where there is a device, it can copy into it while nobody looks.

        Args:
            held: what this rank counts.
            tensors: names of what all ranks count.
            dtype: of the states.
        """
        sizes = [len(shard.state) for shard in held.values()]
        block = torch.empty(sum(sizes), dtype=dtype, pin_memory=torch.accelerator.is_available())
        self._held, self._tensors, self._pieces = held, tensors, block.split(sizes)

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


def _settle() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
