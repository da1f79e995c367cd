"""The engine's shards while they are handed out: every one of them, and those that this rank is the one to count."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch

from relex_verl.trajectory.collectors import Held
from relex_verl.trajectory.shards import ShardSource, TensorShard

__all__ = ["counted", "exhausted"]


@contextmanager
def exhausted(source: ShardSource) -> Iterator[Iterator[TensorShard]]:
    """Iterate to the end, whatever happens: other ranks wait for this one in the engine's own collectives."""
    shards = iter(source)
    try:
        yield shards
    finally:
        for _ in shards:
            pass


def counted(
    shards: Iterator[TensorShard], held: Mapping[str, Held], tensors: Collection[str]
) -> Iterator[tuple[int, Held, torch.Tensor]]:
    """Position, shard and weights now of what this rank counts: all of it, in the same order as before.

    Args:
        shards: all that the engine hands out here.
        held: what this rank counts.
        tensors: names of what all ranks count.

    Raises:
        ValueError: the engine cuts or orders its weights otherwise; a tensor has appeared or is gone.
    """
    names, i = list(held), 0
    for shard in shards:
        if shard.name not in held:
            if shard.name not in tensors and shard.placement.numel:
                raise ValueError(f"{shard.name}: the engine hands out a tensor that it did not have before")
            continue
        if i == len(names) or shard.name != names[i] or shard.placement != held[names[i]].placement:
            raise ValueError(f"{shard.name}: the engine cuts or orders its weights otherwise than before")
        yield i, held[shard.name], shard.data.detach()
        i += 1
    if i != len(names):
        raise ValueError(f"{names[i]} is gone: the engine handed out {i} of the {len(names)} shards that it had before")
