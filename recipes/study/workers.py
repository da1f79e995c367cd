"""Do one thing for every run in a few processes, with a progress bar."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from queue import Empty, Queue
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WORKERS = min(2, os.cpu_count() or 1)


def _work(task: Callable[..., None], run: Any, arguments: tuple, queue: Queue) -> None:
    torch.set_num_threads(1)
    task(run, *arguments, queue.put)


def for_every_run(title: str, task: Callable[..., None], runs: Sequence[Any], arguments: tuple, units: int) -> None:
    """Call `task(run, *arguments, progress)` for every run.

    Args:
        title: of the progress bar.
        task: a function of a module (it is called in other processes).
        runs: what to do it for.
        arguments: further arguments.
        units: how far `progress` counts for one run.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        Progress(*columns, TimeRemainingColumn()) as bar,
        ProcessPoolExecutor(WORKERS, mp_context=context) as pool,
    ):
        queue, row = manager.Queue(), bar.add_task(title, total=units * len(runs))
        pending = {pool.submit(_work, task, run, arguments, queue) for run in runs}
        done: set[Future] = set()
        while pending:
            finished, pending = wait(pending, timeout=0.5)
            done |= finished
            _drain(queue, lambda count: bar.advance(row, count))
            for one in finished:
                one.result()


def _drain(queue: Queue, advance: Callable[[int], None]) -> None:
    while True:
        try:
            advance(queue.get_nowait())
        except Empty:
            return
