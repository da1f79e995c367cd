import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_verl.trajectory.shards import Placement, block_placement, placement_of_positions, whole


def positions(placement):
    """Flat positions in the full tensor of the shard's elements, in the shard's order."""
    taken = []
    for local, full, length in placement.runs():
        assert local == len(taken)
        taken.extend(range(full, full + length))
    return taken


@st.composite
def blocks(draw):
    """(full shape, offset, local shape) of a block within a tensor of 0 to 4 dimensions."""
    full = draw(st.lists(st.integers(1, 5), max_size=4))
    offset = [draw(st.integers(0, size - 1)) for size in full]
    local = [draw(st.integers(0, size - start)) for size, start in zip(full, offset, strict=True)]
    return tuple(full), tuple(offset), tuple(local)


@settings(deadline=None, max_examples=200)
@given(blocks())
def test_a_block_is_its_flat_positions(block):
    full, offset, local = block
    flat = np.arange(np.prod(full, dtype=int)).reshape(full)
    window = flat[tuple(slice(o, o + size) for o, size in zip(offset, local, strict=True))]
    placement = block_placement(local, offset, full)
    assert positions(placement) == window.flatten().tolist()
    assert placement.numel == window.size
    assert all(placement.length)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_ranks_that_cut_a_tensor_count_every_element_once(full, data):
    """Every dimension cut into uneven, possibly empty, parts: rows, columns, or both at a time."""
    cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in full]
    grids = np.meshgrid(*[range(len(cut) - 1) for cut in cuts], indexing="ij")
    taken = []
    for index in zip(*[grid.flatten().tolist() for grid in grids], strict=True):
        offset = tuple(cut[i] for cut, i in zip(cuts, index, strict=True))
        local = tuple(cut[i + 1] - cut[i] for cut, i in zip(cuts, index, strict=True))
        taken += positions(block_placement(local, offset, tuple(full)))
    assert sorted(taken) == list(range(int(np.prod(full))))


@pytest.mark.parametrize(
    ("local", "offset", "full", "expected"),
    [
        ((2, 6), (1, 0), (4, 6), Placement((6,), (12,))),  # rows: one run
        ((4, 2), (0, 4), (4, 6), Placement((4, 10, 16, 22), (2,) * 4)),  # columns: a run a row
        ((1, 2), (3, 4), (4, 6), Placement((22,), (2,))),
        ((2, 3, 5), (2, 0, 0), (8, 3, 5), Placement((30,), (30,))),
        ((2, 1, 5), (2, 1, 0), (8, 3, 5), Placement((35, 50), (5, 5))),
        ((4, 6), (0, 0), (4, 6), Placement((0,), (24,))),
        ((), (), (), Placement((0,), (1,))),
        ((0, 6), (4, 0), (4, 6), Placement((), ())),  # a rank without rows, as FSDP gives
        ((0, 6), (9, 0), (4, 6), Placement((), ())),  # its offset may lie beyond the end
    ],
)
def test_neighbours_are_joined(local, offset, full, expected):
    assert block_placement(local, offset, full) == expected


@pytest.mark.parametrize(
    ("local", "offset"), [((2, 3), (3, 0)), ((2, 3), (-1, 0)), ((4, 1), (0, 3)), ((5, 3), (0, 0)), ((4, 4), (0, 0))]
)
def test_a_block_outside_the_tensor_is_refused(local, offset):
    with pytest.raises(ValueError, match="does not lie within"):
        block_placement(local, offset, (4, 3))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_of_any_positions_keep_their_order(listed):
    placement = placement_of_positions(torch.tensor(listed, dtype=torch.int64))
    assert positions(placement) == listed
    ends = [start + length for start, length in zip(placement.full_start, placement.length, strict=True)]
    assert all(end != start for end, start in zip(ends, placement.full_start[1:], strict=False))


def test_whole():
    assert positions(whole((2, 3))) == list(range(6))
    assert positions(whole(())) == [0]
    assert whole((0, 3)).numel == 0
    assert whole(iter([2, 3])) == whole((2, 3))
