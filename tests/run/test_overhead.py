"""The bound on what observing costs: rows become rarer, and then there are none."""

import time
from pathlib import Path

import pytest
from stand_ins import config

from relex_verl.run.overhead import Overhead
from relex_verl.run.schedule import Schedule


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def train(overhead: Overhead, clock: list[float], steps: int, waited: float) -> None:
    """Steps of a second, of which the training waits so long."""
    for _ in range(steps):
        clock[0] += 1 - waited
        with overhead.step():
            clock[0] += waited


@pytest.mark.parametrize("on_cut", ["advise", "jump"])
def test_rows_become_rarer_then_there_are_none(
    on_cut: str, clock: list[float], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    targets = {} if on_cut == "jump" else {"targets": [600]}
    schedule = Schedule(config(tmp_path, on_cut=on_cut, t_cut=100, **targets)[0], 600)
    overhead = Overhead(0.02)

    def every() -> int:
        assert schedule.plan is not None
        return schedule.plan.observe_every

    train(overhead, clock, 11, waited=0.019)
    assert overhead.share == pytest.approx(0.019)
    assert overhead.bearable(schedule)
    assert every() == 1
    for rarer in (2, 4, 8):
        train(overhead, clock, 10, waited=0.05)
        assert overhead.bearable(schedule)
        assert every() == rarer
        train(overhead, clock, 1, waited=0.05)  # the first one after that measures from nowhere
        assert overhead.share is None
    schedule.plan = schedule.following()
    assert every() == 8  # so it stays in the windows that follow
    train(overhead, clock, 10, waited=0.05)
    assert not overhead.bearable(schedule)
    said = "observing took 5.0% of the last steps' time, more than relex.max_overhead=0.02"
    assert caplog.messages[0] == f"RELEX: {said}: from here on it observes every 2 steps"
    assert caplog.messages[-1] == f"RELEX: {said}, rare as rows have become: it observes no further"


def test_without_a_bound_nothing_changes(clock: list[float], tmp_path: Path) -> None:
    schedule, overhead = Schedule(config(tmp_path)[0], 20), Overhead(None)
    train(overhead, clock, 50, waited=0.5)
    assert overhead.bearable(schedule)
    assert schedule.plan is not None
    assert schedule.plan.observe_every == 1
