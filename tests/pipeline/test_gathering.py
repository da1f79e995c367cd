"""Whole tensors from the shards of two gloo ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import RUN, on_two_ranks, weights_of
from recorded import write_base

from relex_verl.pipeline.collectives import PeerError
from relex_verl.pipeline.gathering import whole_tensors, with_copies
from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard


def fail_while_weights_are_put_together(rank: int, world: int, base: Path, out: Path) -> None:
    """Rank 1's shards fail in the middle: both ranks hear of it at the end, none waits in a collective."""
    observer = Observer(out / "trajectory", str(base), {}, RUN, KINDS["bf16"])
    source = RankSource(DriftingModel(weights_of(base)).at(1), rank, world)
    observer.start(source)

    def broken() -> Iterator[TensorShard]:
        for i, shard in enumerate(observer.current(source)):
            if rank == 1 and i == 3:
                raise OSError("gone")
            yield shard

    handed = []
    with pytest.raises(OSError if rank == 1 else PeerError):
        handed += [
            name for name, _ in whole_tensors(observer.ranks, observer.base, observer.shapes, {}, broken(), "cpu")
        ]
    tied = {"tied": next(iter(observer.shapes))}
    whole = dict(whole_tensors(observer.ranks, observer.base, observer.shapes, tied, observer.current(source), "cpu"))
    for name, tensor in DriftingModel(weights_of(base)).at(1).items():
        assert torch.equal(whole[name], tensor.to(torch.bfloat16))
    assert whole["tied"] is whole[next(iter(observer.shapes))]

    # What both ranks have, one of them counts: vectors here, in turn.
    has = {shard.name: shard for shard in source}
    counted = [has[name] for name in observer.shapes if name in observer.held]
    assert 0 < len(counted) < len(has)
    placements = {name: shard.placement for name, shard in has.items()}
    copied = with_copies(observer.ranks, observer.shapes, counted, placements)
    assert [shard.name for shard in copied] == list(observer.shapes)
    for shard in copied:
        assert torch.equal(shard.data, has[shard.name].data)
        assert (shard.shape, shard.placement) == (has[shard.name].shape, has[shard.name].placement)


def test_whole_tensors_on_two_ranks(base: Path, tmp_path: Path) -> None:
    on_two_ranks(fail_while_weights_are_put_together, base, tmp_path)


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8"])
def test_each_whole_tensor_has_the_type_of_the_base(tmp_path: Path, kind: str) -> None:
    """Under bf16, what a float32 tensor holds of the engine's is its rounding, but never the base's own weights'."""
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(40, generator=generator).bfloat16(), "b": torch.randn(40, generator=generator)}
    now = {name: tensor.float() + torch.tensor([0.0, 1.0]).repeat(20) for name, tensor in base.items()}
    observer = Observer(tmp_path / "trajectory", str(write_base(tmp_path / "base", base)), {}, RUN, KINDS[kind])
    observer.start(RankSource(now))
    followed = observer.kind.dtype
    shards = observer.current(RankSource({name: tensor.to(followed) for name, tensor in now.items()}))
    whole = dict(whole_tensors(observer.ranks, observer.base, observer.shapes, {}, shards, "cpu", followed))
    for name, tensor in base.items():
        assert whole[name].dtype == tensor.dtype
        assert torch.equal(whole[name][::2], tensor[::2])
        assert torch.equal(whole[name][1::2], now[name].to(followed)[1::2].to(tensor.dtype))
