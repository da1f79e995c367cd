"""A small real checkpoint, and others written in its layout."""

import itertools

import pytest
import torch
from fakes import qwen2

from relex_verl.trajectory.checkpoint_writer import CheckpointWriter
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import TensorShard, block_placement, placement_of_positions, whole

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory):
    """A small real model in several files, with the odd other file beside them."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    torch.manual_seed(0)
    qwen2(folder, 50, 16, 20, request.param == "tied", torch.float32, "6KB")
    (folder / "vocab.txt").write_text("a b c")
    (folder / "pytorch_model.bin").write_bytes(b"old weights in another format")
    checkpoint = BaseCheckpoint(folder)
    assert len({entry.file for entry in checkpoint.entries.values()}) > 2
    assert (HEAD in checkpoint.entries) == (request.param == "untied")
    return checkpoint


def new_values(base, seed=1, dtype=torch.bfloat16):
    """Other weights for every tensor of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(entry.shape, generator=generator).to(dtype) for name, entry in sorted(base.entries.items())
    }


def write_whole(base, folder, values, aliases=(), dtype=None, provenance=None, followed=torch.float32):
    writer = CheckpointWriter(base, folder, set(values), dict(aliases), dtype, followed)
    writer.begin()
    for name, value in values.items():
        writer.write(TensorShard(name, tuple(value.shape), whole(value.shape), value.flatten()))
    return writer.commit(provenance)


def cut_up(name, value, rng):
    """The shards of one tensor as some four ranks could hold it: rows, columns, or scattered runs; some empty."""
    way, shape = rng.choice(["rows", "columns", "scattered"]), tuple(value.shape)
    if way == "scattered":
        owner = torch.tensor([rng.randrange(4) for _ in range(value.numel())])
        placements = [placement_of_positions((owner == rank).nonzero().flatten()) for rank in range(4)]
    else:
        dim = 0 if way == "rows" else len(shape) - 1
        cuts = [0, *sorted(rng.randrange(shape[dim] + 1) for _ in range(3)), shape[dim]]
        placements = []
        for start, stop in itertools.pairwise(cuts):
            local = [*shape[:dim], stop - start, *shape[dim + 1 :]]
            offset = [start if d == dim else 0 for d in range(len(shape))]
            placements.append(block_placement(tuple(local), tuple(offset), shape))
    flat = value.flatten()
    for placement in placements:
        parts = [flat[full : full + length] for _, full, length in placement.runs()]
        yield TensorShard(name, shape, placement, torch.cat([flat[:0], *parts]))


def content(folder):
    """Bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
