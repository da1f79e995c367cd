"""Whole tensors from the ranks' shards, one at a time: what a rollout engine wants, and ranks that hold copies."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from relex_verl.pipeline.collectives import Collectives
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import Placement, TensorShard

__all__ = ["whole_tensors", "with_copies"]


def whole_tensors(
    ranks: Collectives,
    base: BaseCheckpoint,
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    shards: Iterator[TensorShard],
    device: Any,
    followed: torch.dtype = torch.float32,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Put the ranks' shards together. Collective: all ranks iterate, to the end.

    Args:
        ranks: all of them.
        base: the base model, which says the type of each tensor.
        shapes: of all tensors, in the order of the stacks.
        aliases: tied name -> the name that it shares its elements with.
        shards: this rank's, in the same order.
        device: where the whole tensors go.
        followed: the type of the trajectory's states, see `BaseCheckpoint.in_own_type`.

    Yields:
        Name and whole tensor, in the type of the base's, on each rank; a tied name follows the one that it shares its
        elements with.

    Raises:
        Exception: that of this rank's shards.
        PeerError: another rank's failed.
    """
    own = (base.in_own_type(shard, followed) for shard in shards)
    for name, tensor in _merged(ranks, shapes, own, base.dtype, device):
        yield name, tensor
        yield from ((alias, tensor) for alias, held in aliases.items() if held == name)


def with_copies(
    ranks: Collectives,
    shapes: Mapping[str, tuple[int, ...]],
    shards: Iterable[TensorShard],
    has: Mapping[str, Placement],
) -> list[TensorShard]:
    """Of what the ranks count, each element on one of them, what this one has. Collective; one whole tensor in memory.

    Args:
        ranks: all of them.
        shapes: of all tensors, in the order of the stacks.
        shards: float32, on the host: what this rank counts, in the same order.
        has: name -> which of its elements this rank has, its copies of others' too.

    Raises:
        Exception: that of this rank's shards.
        PeerError: another rank's failed.
    """
    return [
        TensorShard(name, shapes[name], has[name], has[name].cut_out_of(tensor))
        for name, tensor in _merged(ranks, shapes, iter(shards), lambda name: torch.float32, "cpu")
        if name in has
    ]


def _merged(
    ranks: Collectives,
    shapes: Mapping[str, tuple[int, ...]],
    shards: Iterator[TensorShard],
    dtype: Callable[[str], torch.dtype],
    device: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and whole tensor.

    A rank whose shards fail goes on with zeros, so that no other is left waiting for it in the middle of a tensor; the
    error comes at the end, on every rank, and the weights that were handed out are worth nothing then.
    """
    errors: list[Exception] = []
    shards = _until_error(shards, errors)
    shard = next(shards, None)
    for name, shape in shapes.items():
        flat = torch.zeros(torch.Size(shape).numel(), dtype=dtype(name), device=device)
        while shard is not None and shard.name == name:
            data = shard.data.to(device)
            for local, full, length in shard.placement.runs():
                flat[full : full + length] = data[local : local + length]
            shard = next(shards, None)
        yield name, ranks.merge(flat).view(shape)
    ranks.all_or_nothing(errors[0] if errors else None)


def _until_error(shards: Iterator[TensorShard], errors: list[Exception]) -> Iterator[TensorShard]:
    try:
        yield from shards
    except Exception as error:
        errors.append(error)
