"""Independent work on several processors, in the order in which it was given. torch lets go of the interpreter's lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["all_processors", "in_order"]

MOST = 8  # each has the temporaries of a tensor in hand
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`work` of every item, in their order.

    Args:
        work: what does not depend on other items; an error in it is raised where its result would come.
        items: asked for one after another by the thread that takes the results, as many ahead as there are threads.
        threads: who works; 1 for the caller.
    """
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def all_processors() -> Iterator[int]:
    """Threads for `in_order`, each of which works on its own, where torch would share out every small operation.

    Sharing out is dear: an operation on a chunk takes some 50 us.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(MOST, len(os.sched_getaffinity(0)))
    finally:
        torch.set_num_threads(before)
