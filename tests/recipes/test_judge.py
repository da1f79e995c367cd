"""The judge judged: what the simulated trainer answers with, and what is counted of the decisions."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))

from judge import __main__ as judge
from judge.decisions import simulate
from judge.world import World, flat, rising

from relex_verl.maths.extrapolators import Prediction

FAR = Prediction("relex", 120)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("world", [World(4000, flat(0.05)), World(2000, flat(-0.05), samples=2, levels=4, cluster=5)])
def test_predictions_gain_what_they_are_said_to(world: World) -> None:
    host = world.host(0)
    host.window = 0, 30
    gains = [
        host.relex_validate(FAR, None, 1).score - host.relex_validate("observed", None, 1).score for _ in range(60)
    ]
    assert fmean(gains) == pytest.approx(world.curve(4), abs=0.01)


def test_a_curve_rises_peaks_and_falls() -> None:
    curve = rising(0.05)
    assert (curve(1), curve(4), curve(16)) == pytest.approx((0, 0.05, 0))
    assert curve(32) < 0


def test_rows_of_one_text_are_one_prompt() -> None:
    validation = World(200, flat(0), repeats=2).host(0).relex_validate("observed", None, 1)
    assert len(validation.samples) == 100
    assert {len(answers) for answers in validation.samples.values()} == {2}


def test_what_is_much_better_stops_the_run_and_what_is_much_worse_never() -> None:
    better = [simulate(World(500, flat(0.3)), seed) for seed in range(5)]
    worse = [simulate(World(500, flat(-0.3)), seed) for seed in range(5)]
    assert [outcome.advice[-1].action for outcome in better] == ["stop"] * 5
    assert not any(outcome.any("stop") for outcome in worse)
    assert {len(outcome.advice) for outcome in worse} == {6}
    assert not any(simulate(World(500, flat(-0.3)), seed, "jump").any("jump") for seed in range(5))


def test_the_tables_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    worlds, sizes = {"one answer a prompt": World(20, flat(0))}, (20, 40, 40)
    lines = judge.tables(5, worlds, sizes)
    rows = [line for line in lines if line.startswith("| ")]
    assert sum(line.count(" %") for line in rows) == 1 + 3 * 7 + 3 * 3
