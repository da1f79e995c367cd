"""The rule alone, and the ranks that ask it."""

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import GIB, limit
from pipeline import on_two_ranks, weights_of
from ranks import rank_of

from relex_verl.pipeline.collectives import Collectives
from relex_verl.run.admission import BudgetError, Estimate, RankFacts, estimate
from relex_verl.run.budget import Workload
from relex_verl.trajectory.kinds import KINDS

# A rank of 2^28 parameters takes 3 GiB: a state of 4 bytes and two rows of as many.
PLAIN = Workload(KINDS["fp32-none"], tensors=0, rows=2, observe_every=1, predictions=1)
RANK = 2**28


def two_nodes(first: int | None, second: int | None, ranks: int = 2, **facts: bool) -> list[RankFacts]:
    return [RankFacts(node, RANK, left, **facts) for node, left in (("a", first), ("b", second)) for _ in range(ranks)]


def test_every_node_has_to_have_the_memory_of_its_ranks() -> None:
    need = estimate(PLAIN, two_nodes(6 * GIB, 6 * GIB))
    assert [(node.ranks, node.memory, node.to_come) for node in need.nodes] == [(2, 6 * GIB, 6 * GIB)] * 2
    assert (need.admitted, need.refusal, need.elements, need.largest) == (True, None, 4 * RANK, RANK)
    need.admit()
    for left in ((6 * GIB, 6 * GIB - 1), (6 * GIB - 1, 6 * GIB), (None, 6 * GIB - 1)):
        assert estimate(PLAIN, two_nodes(*left)).admitted is False


def test_memory_that_does_not_fit_is_refused_with_both_figures() -> None:
    refused = estimate(PLAIN, two_nodes(3 * GIB // 2, 6 * GIB))
    says = r"about 6\.0 GiB of host memory on a node \(2 ranks\), 1\.5 GiB are available: lower relex\.t_cut"
    with pytest.raises(BudgetError, match=says) as caught:
        refused.admit()
    assert refused.refusal == str(caught.value)


def test_what_is_least_on_a_node_counts() -> None:
    ranks = [RankFacts("a", RANK, 6 * GIB), RankFacts("a", RANK, 6 * GIB - 1)]
    assert estimate(PLAIN, ranks).admitted is False


def test_memory_that_the_optimizer_will_take_is_not_there() -> None:
    """8 bytes a parameter, until theta_0 is taken: after the first step it is there."""
    enough = two_nodes(10 * GIB, 10 * GIB, optimizer_on_host=True)
    assert estimate(PLAIN, enough).admitted
    short = two_nodes(9 * GIB, 9 * GIB, optimizer_on_host=True)
    says = r"9\.0 GiB are available, of which the optimizer will take 4\.0 GiB: lower"
    with pytest.raises(BudgetError, match=says):
        estimate(PLAIN, short).admit()
    held = Workload(KINDS["fp32-none"], tensors=0, rows=3, observe_every=1, predictions=1, rows_held=2)
    assert estimate(held, two_nodes(2 * GIB, 2 * GIB, optimizer_on_host=True)).admitted
    assert estimate(held, two_nodes(2 * GIB, 2 * GIB - 1, optimizer_on_host=True)).admitted is False


def test_disk_that_does_not_fit_is_refused_with_the_figures() -> None:
    """8 GiB of rows and 2 GiB of a prediction."""
    everyone = two_nodes(6 * GIB, 6 * GIB)
    assert estimate(PLAIN, everyone, disk_free=10 * GIB).admitted
    says = r"/out has 9\.0 GiB free, about 10\.0 GiB are needed \(8\.0 GiB for the trajectory, 2\.0 GiB for pr"
    with pytest.raises(BudgetError, match="relex.output_dir=" + says):
        estimate(PLAIN, everyone, disk_free=9 * GIB, output_dir=Path("/out")).admit()
    assert estimate(PLAIN, everyone, disk_free=10 * GIB - 1).refusal.startswith("relex.output_dir has 10.0 GiB free")


def test_what_nobody_knows_is_not_checked() -> None:
    unknown = two_nodes(None, None)
    assert estimate(PLAIN, unknown).admitted is None
    assert estimate(PLAIN, unknown, disk_free=10 * GIB).admitted is True
    assert estimate(PLAIN, unknown, disk_free=0).admitted is False
    assert estimate(PLAIN, two_nodes(6 * GIB, 6 * GIB)).admitted is True


def test_the_words_tell_of_the_tightest_node_and_of_what_is_assumed() -> None:
    said = estimate(PLAIN, two_nodes(20 * GIB, 7 * GIB), disk_free=10 * GIB, output_dir=Path("/out")).words
    assert said == (
        "1.07e+09 parameters on 4 ranks, 2 rows of fp32-none: about 6.0 GiB of host memory on a node of 2 ranks "
        "(7.0 GiB available), 8.0 GiB of trajectory and 2.0 GiB of predictions in /out"
    )
    changing = Workload(KINDS["bf16"], tensors=0, rows=2, observe_every=1, predictions=1)
    assert "2 rows of bf16, 3% of the weights changing a step: about" in estimate(changing, two_nodes(1, 1)).words
    assert "(2 ranks, 3% of the weights changing a step), 0.0" in (estimate(changing, two_nodes(1, 1)).refusal or "")


@given(
    st.sampled_from(list(KINDS)),
    st.integers(2, 200),
    st.integers(0, 500),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 10**10), st.booleans()), min_size=1, max_size=9),
    st.integers(0, 199),
)
def test_a_run_fits_into_just_what_it_takes(
    encoding: str, rows: int, tensors: int, ranks: list[tuple[str, int, bool]], held: int
) -> None:
    for rows_held in (None, min(held, rows)):
        kept = Workload(KINDS[encoding], tensors, rows, 1, 2, rows_held=rows_held)

        def decided(short: str = "", disk: int = 0, kept: Workload = kept) -> Estimate:
            """With just the memory that each node needs, and a byte less on one."""
            needs = dict.fromkeys("abc", 0)
            for node, elements, offloads in ranks:
                needs[node] += kept.memory_to_come(elements) + 8 * elements * (offloads and kept.rows_held is None)
            facts = [RankFacts(node, size, needs[node] - (node == short), on) for node, size, on in ranks]
            total = sum(size for _, size, _ in ranks)
            return estimate(kept, facts, kept.trajectory(total) + kept.predicted(total) - disk)

        assert decided().admitted
        assert not decided(disk=1).admitted
        assert not any(decided(short=node).admitted for node, _, _ in ranks)


@pytest.mark.parametrize("trajectory", ["bf16", "fp32", "sketch"])
def test_later_rows_fit_into_just_what_they_take(
    trajectory: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, engine = rank_of(base, tmp_path, trajectory=trajectory)
    rank.start()
    rank.open(0)
    for engine.step in (1, 2, 3):
        rank.observe(engine.step, now=False)
    shapes = [tensor.numel() for tensor in weights_of(base).values()]
    name = {"bf16": "bf16", "fp32": "fp32-int8", "sketch": "sketch-4"}[trajectory]
    later = Workload(KINDS[name], len(shapes), 3 + 9, observe_every=1, predictions=2, rows_held=3)
    memory = later.memory_to_come(sum(shapes))
    limit(monkeypatch, memory=memory)
    rank.room(9)
    limit(monkeypatch, memory=memory - 1)
    with pytest.raises(BudgetError, match="host memory"):
        rank.room(9)
    limit(monkeypatch, disk=later.trajectory(sum(shapes)) + later.predicted(sum(shapes)) - 1)
    with pytest.raises(BudgetError, match=f"relex.output_dir={tmp_path} has"):
        rank.room(9)


def ask_on_two_nodes(rank: int, world: int, base: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"node-{rank}")
        for memory, disk in ((rank * GIB, GIB), ((1 - rank) * GIB, GIB), (GIB, 0)):
            limit(patch, memory, disk if rank == 0 else GIB)
            with pytest.raises(BudgetError) as caught:
                rank_of(base, folder, rank, world)[0].start()
            assert len(set(Collectives().gather(str(caught.value)))) == 1
        limit(patch, GIB, GIB * (1 - rank))  # rank 0 has looked at the folder for all
        words = rank_of(base, folder, rank, world)[0].start().cost
        assert "on 2 ranks" in words
        assert "on a node of 1 ranks" in words
        assert set(Collectives().gather(words)) == {words}


@pytest.mark.timeout(120)
def test_all_ranks_decide_the_same(base: Path, tmp_path: Path) -> None:
    on_two_ranks(ask_on_two_nodes, base, tmp_path)
