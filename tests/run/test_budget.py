from dataclasses import replace

import pytest

from relex_verl.run.budget import Traffic, Workload, gib, predictions_to_write, traffic
from relex_verl.trajectory.kinds import KINDS

BILLION = 10**9


def workload(encoding: str, rows: int, **facts: int | float | None) -> Workload:
    return Workload(KINDS[encoding], **{"tensors": 0, "rows": rows, "observe_every": 1, "predictions": 0, **facts})


def test_memory_is_state_and_rows_of_a_rank_and_the_gram_matrices() -> None:
    assert workload("bf16", 10, change_rate=0.5).memory(1000) == 1000 * (2 + 10 * 4 * 0.5)
    assert workload("fp32-none", 10).memory(1000) == 1000 * (4 + 10 * 4)
    assert workload("fp32-none", 10, tensors=7).memory(1000) == 1000 * (4 + 10 * 4) + 2 * 7 * 10**2 * 8


def test_disk_is_the_rows_and_the_bytes_of_the_base_or_two_a_predicted_weight() -> None:
    kept = workload("fp32-none", 10, tensors=7, predictions=3)
    assert (kept.trajectory(4000), kept.predicted(4000)) == (4000 * 10 * 4, 3 * 4000 * 2)
    assert replace(kept, checkpoint=9000).predicted(4000) == 3 * 9000
    assert predictions_to_write(3) == 4


def test_a_sketch_costs_the_same_however_many_rows() -> None:
    for rows in (16, 1000):
        kept = workload("sketch-4", rows)
        assert kept.memory(BILLION) == 20 * BILLION
        assert kept.trajectory(BILLION) == 3 * 16 * BILLION


@pytest.mark.parametrize("encoding", ["bf16", "fp32-int8"])
def test_what_is_there_already_is_not_to_come(encoding: str) -> None:
    """All but the Gram matrices, which are made anew of all rows."""
    before, after = workload(encoding, 10, tensors=7), workload(encoding, 25, tensors=7)
    later = replace(after, rows_held=10)
    gram = 2 * 7 * 10**2 * 8
    assert after.memory_to_come(1000) == after.memory(1000) == later.memory(1000)
    assert later.memory_to_come(1000) == after.memory(1000) - (before.memory(1000) - gram)
    assert later.trajectory(1600) == after.trajectory(1600) - before.trajectory(1600)


def test_a_sketch_takes_no_more_memory_after_a_cut_and_two_more_files() -> None:
    later = workload("sketch-4", 25, rows_held=10)
    assert (later.memory_to_come(1000), later.trajectory(1000)) == (0, 2 * 16 * 1000)


def test_more_weights_change_between_rows_that_lie_apart() -> None:
    apart = workload("bf16", 10, observe_every=5, change_rate=0.01)
    assert apart.row_bytes == pytest.approx(4 * 0.05)
    assert replace(apart, change_rate=0.3).row_bytes == 4


def test_only_bf16_depends_on_how_many_weights_change() -> None:
    assert [name for name in KINDS if workload(name, 10).depends_on_change_rate] == ["bf16"]


@pytest.mark.parametrize(
    ("name", "rows", "bytes_each"),
    # bf16 at the careful 3 % a step, fp32 with a byte a row.
    [("bf16", 75, (11, 11)), ("fp32-int8", 12, (16, 17)), ("fp32-int4", 12, (10, 11)), ("fp32-none", 12, (52, 52))],
)
def test_bytes_a_parameter(name: str, rows: int, bytes_each: tuple[int, int]) -> None:
    assert bytes_each[0] <= workload(name, rows).memory(BILLION) / BILLION <= bytes_each[1]


def test_traffic_is_each_byte_that_is_kept_and_the_weights() -> None:
    assert traffic(workload("fp32-none", 10), 1000) == Traffic(
        observe=1000 * (4 + 4 + 40), append=1000 * 4, predict=1000 * (4 + 40 + 2)
    )
    assert traffic(workload("sketch-4", 10), 1000).append == 0


@pytest.mark.parametrize(
    ("size", "says"),
    [(0, "0.000 GiB"), (2**20, "0.001 GiB"), (2**29, "0.500 GiB"), (2**30, "1.0 GiB"), (10**12, "931.3 GiB")],
)
def test_bytes_are_told_in_one_unit(size: int, says: str) -> None:
    assert gib(size) == says


def test_a_run_that_jumps_takes_a_prediction_in_memory_and_on_disk_what_undoes_it() -> None:
    plain = Workload(KINDS["fp32-int8"], tensors=1, rows=16, observe_every=1, predictions=0)
    jumps = replace(plain, jump=True)
    assert jumps.memory(1000) - plain.memory(1000) == 4 * 1000
    assert jumps.trajectory(1000) - plain.trajectory(1000) == 16 * 1000
    copied = replace(jumps, copies=3)
    assert copied.memory(1000) - plain.memory(1000) == 3 * 4 * 1000
    assert copied.trajectory(1000) - plain.trajectory(1000) == (4 + 3 * 12) * 1000
    assert replace(jumps, bounded=True).memory(1000) - jumps.memory(1000) == 4 * 1000


def test_what_is_recorded_takes_disk_and_one_row_of_memory() -> None:
    cut = workload("fp32-none", 10, tensors=7)
    recorded = replace(cut, recorded=90)
    assert recorded.memory(1000) == cut.memory(1000)
    assert recorded.trajectory(1600) == cut.trajectory(1600) + 90 * 4 * 1600
    alone = workload("bf16", 0, tensors=7, change_rate=0.5, recorded=100)
    assert (alone.memory(1000), alone.trajectory(1000)) == (1000 * (2 + 2), 100 * 1000 * 2)
