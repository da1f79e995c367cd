import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.trajectory.parallel import all_processors, in_order


@given(st.lists(st.floats(0, 0.002), max_size=20), st.integers(1, 4))
def test_results_come_in_the_order_of_the_items(waits, threads):
    def work(item):
        i, wait = item
        time.sleep(wait)
        return i

    assert list(in_order(work, enumerate(waits), threads)) == list(range(len(waits)))


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_asked_for_than_is_worked_on(threads):
    asked = []
    for taken, _ in enumerate(in_order(lambda item: item, (asked.append(i) for i in range(20)), threads), 1):
        assert len(asked) <= taken + threads


def test_as_many_work_at_a_time_as_there_are_threads():
    together = threading.Barrier(3, timeout=20)
    assert list(in_order(lambda _: together.wait() >= 0, range(6), 3)) == [True] * 6


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_comes_where_its_result_would(threads):
    def work(item):
        return 1 / item

    results = in_order(work, [1, 2, 0, 4], threads)
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_torch_shares_nothing_out_meanwhile():
    before = torch.get_num_threads()
    with all_processors() as threads:
        assert torch.get_num_threads() == 1 <= threads
    assert torch.get_num_threads() == before
