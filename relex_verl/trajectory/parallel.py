"""Independent work on several processors, in the order in which it was given. torch lets go of the interpreter's lock."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

__all__ = ["all_processors", "in_order", "share"]

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


def share(work: Callable[[int], Result], count: int) -> list[Result]:
    """`work` of 0 .. count - 1, by as many threads as torch uses; who is free takes the next. It lets go of the lock.

    Args:
        work: of one number; an error in it is raised here.
        count: of them.
    """
    threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)), count)
    if threads <= 1:
        return [work(i) for i in range(count)]
    numbers, results = itertools.count(), [None] * count

    def run() -> None:
        while (i := next(numbers)) < count:
            results[i] = work(i)  # type: ignore[call-overload]

    others = [_pool(os.getpid()).submit(run) for _ in range(threads - 1)]
    try:
        run()
    finally:
        wait(others)  # after an error, too: they work on what the caller is about to let go of
    for other in others:
        other.result()
    return results  # type: ignore[return-value]


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads that wait for work; of the process: one that was forked has none of its parent's."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "relex")
