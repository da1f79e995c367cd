"""A rank that observes beside the training: an engine in memory, which goes on as soon as it may."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import on_two_ranks
from ranks import Engine, rank_of

from relex_verl.pipeline.collectives import Collectives, PeerError
from relex_verl.run.rank import RelexRank
from relex_verl.trajectory.store import Trajectory

CUT = 4


def started(base: Path, folder: Path, rank: int = 0, world: int = 1, **relex: Any) -> tuple[RelexRank, Engine]:
    """Ready for the first step."""
    run, engine = rank_of(base, folder, rank, world, t_cut=CUT, **relex)
    run.start()
    run.open(0)
    return run, engine


def follow(run: RelexRank, engine: Engine) -> list[dict[str, float]]:
    """Up to the cut; what each step was told."""
    told = []
    for step in range(1, CUT + 1):
        engine.step = step
        told.append(run.observe(step, now=step == CUT))
    return told


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trajectory", ["bf16", "fp32", "sketch"])
def test_beside_the_training_or_not_the_same_bits(trajectory: str, base: Path, tmp_path: Path) -> None:
    """The trajectory's files, G and what the driver is told, which comes a row later."""
    found = {}
    for overlap in (True, False):
        run, engine = started(base, tmp_path / str(overlap), trajectory=trajectory, overlap=overlap)
        told = [{key: value for key, value in one.items() if key != "relex/seconds"} for one in follow(run, engine)]
        run.fit(["relex"], [20])
        found[overlap] = told, files_of(tmp_path / str(overlap) / "trajectory"), run._observed.window().gram_LTT
    (late, files, gram_LTT), (at_once, same_files, same_LTT) = found[True], found[False]
    assert files == same_files
    assert len(files) > 2
    assert torch.equal(gram_LTT, same_LTT)
    assert late[0] == {}
    assert late[1:-1] == at_once[:-2]
    assert late[-1] == at_once[-1]  # the cut's own: the row before it is told of nowhere
    assert [one["relex/observed_step"] for one in at_once] == [1, 2, 3, 4]


def test_what_asks_for_rows_waits_for_the_one_under_way(base: Path, tmp_path: Path) -> None:
    run, engine = started(base, tmp_path)
    for step in (1, 2):
        engine.step = step
        run.observe(step, now=False)
    run.save()  # as verl does before its checkpoint
    assert Trajectory(tmp_path / "trajectory").windows[-1].steps == [1, 2]
    engine.step = 3
    assert run.observe(3, now=False)["relex/observed_step"] == 2  # nothing that was told got lost
    run.room(1)
    assert len(run._observed.steps) == 3


def fail_on_rank_0_alone(rank: int, world: int, base: Path, folder: Path) -> None:
    """Nothing but rank 0's figures fail, after all that the ranks do together; then a row of both fails on rank 1."""
    with pytest.MonkeyPatch.context() as patch:
        run, engine = started(base, folder / "figures", rank, world)
        engine.step = 1
        run.observe(1, now=True)

        def fails(*_: Any) -> float:
            raise ArithmeticError("no figures")

        patch.setattr("relex_verl.run.rank.half_backtest", fails)
        engine.step = 2
        run.observe(2, now=False)
        engine.step = 3
        with pytest.raises((ArithmeticError, PeerError)) as caught:
            run.observe(3, now=False)
        assert isinstance(caught.value, PeerError) == (rank == 1)
    run, engine = started(base, folder / "row", rank, world)
    engine.step = 1
    if rank == 1:
        engine.weights["model.embed_tokens.weight"] *= torch.nan
    run.observe(1, now=False)
    engine.step = 2
    with pytest.raises((ValueError, PeerError)) as caught:
        run.observe(2, now=False)
    assert isinstance(caught.value, PeerError) == (rank == 0)
    assert Collectives().gather(rank) == [0, 1]  # nobody has been left in a collective of the training's


def test_the_error_of_one_rank_is_raised_on_both_at_the_next_step(base: Path, tmp_path: Path) -> None:
    on_two_ranks(fail_on_rank_0_alone, base, tmp_path)
