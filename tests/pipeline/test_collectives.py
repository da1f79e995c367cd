import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from relex_verl.pipeline.collectives import Collectives, PeerError

RANKS = 2
ALL = Collectives()


def on_ranks(worker, folder):
    """Run worker(rank) in two gloo processes; a hang is ended by the pytest timeout of the caller."""
    mp.spawn(in_group, args=(worker, str(folder / "store")), nprocs=RANKS, join=True)


def in_group(rank, worker, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        worker(rank)
    finally:
        dist.destroy_process_group()


def check_all(rank):
    """Everything that needs a second process, in one start: starting processes is what costs here."""
    check_sums(rank)
    check_gathers(rank)
    check_merges(rank)
    check_nobody_failed(rank)
    for failing in range(RANKS):
        check_one_failed(rank, failing)
    check_both_failed(rank)
    # After failures that all ranks saw together, the group is still in step.
    assert ALL.gather(rank) == [0, 1]


def check_sums(rank):
    assert (ALL.rank, ALL.world_size) == (rank, RANKS)
    mine = torch.arange(6, dtype=torch.float64).reshape(1, 2, 3) * 10**rank + 0.25
    kept = mine.clone()
    total = ALL.sum_over_ranks(mine)
    assert total.device.type == "cpu"
    assert total.dtype == torch.float64
    assert torch.equal(total, torch.arange(6, dtype=torch.float64).reshape(1, 2, 3) * 11 + 0.5)
    assert torch.equal(mine, kept), "the caller's tensor was changed"
    uneven = ALL.sum_over_ranks(torch.tensor([0.1 + 1e-17 * rank, 1e16 * rank], dtype=torch.float64))
    everywhere = ALL.gather(uneven)
    assert torch.equal(everywhere[0], everywhere[1])
    assert ALL.sum_over_ranks(torch.zeros(0, dtype=torch.float64)).shape == (0,)


def check_gathers(rank):
    assert ALL.gather({"rank": rank, "names": ["a"] * rank}) == [
        {"rank": 0, "names": []},
        {"rank": 1, "names": ["a"]},
    ]
    assert ALL.gather(None) == [None, None]


def check_merges(rank):
    """Bits are kept: -0.0, a NaN's payload, all ones."""
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.tensor([-0.0, 1.5, float("nan"), -3e38, 0.0, 1e-40], dtype=torch.float64).to(dtype)
        whole.view(torch.uint8)[-2:] = 255
        mine = torch.zeros_like(whole)
        mine[rank::RANKS] = whole[rank::RANKS]
        merged = ALL.merge(mine)
        assert merged.dtype == dtype
        assert torch.equal(merged.view(torch.uint8), whole.view(torch.uint8))


def check_nobody_failed(rank):
    assert ALL.all_or_nothing(None) is None


def check_one_failed(rank, failing):
    own = ValueError(f"disk full on {rank}")
    with pytest.raises((ValueError, PeerError)) as caught:
        ALL.all_or_nothing(own if rank == failing else None)
    if rank == failing:
        assert caught.value is own
    else:
        assert type(caught.value) is PeerError
        assert "1 of 2 ranks failed" in str(caught.value)


def check_both_failed(rank):
    own = OSError(rank)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        ALL.all_or_nothing(own)
    assert caught.value is own


@pytest.mark.timeout(60)
def test_two_ranks(tmp_path):
    on_ranks(check_all, tmp_path)


def test_one_rank_needs_no_group():
    assert not dist.is_initialized()
    assert (ALL.rank, ALL.world_size) == (0, 1)
    mine = torch.tensor([1.5], dtype=torch.float64)
    assert ALL.sum_over_ranks(mine).tolist() == [1.5]
    assert ALL.gather("mine") == ["mine"]
    assert ALL.merge(mine).tolist() == [1.5]
    assert ALL.all_or_nothing(None) is None
    with pytest.raises(KeyError, match="mine"):
        ALL.all_or_nothing(KeyError("mine"))
