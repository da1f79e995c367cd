"""Windows that begin while a run goes on, with and without jumps, killed and resumed at any moment of any step."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import on_two_ranks
from recorded import write_base
from windowed import BASE, Driver, History, Script, jump_at, named_content, part, script

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.collectives import PeerError
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate, predicted_tensors
from relex_verl.trajectory import replay
from relex_verl.trajectory.holding import last_before, window_holding
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory

EVERY_KIND = ["bf16", "fp32-int8", "fp32-int4", "fp32-none", "sketch-4"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("start") / "base", BASE)


def check(folder: Path, script: Script) -> None:
    """Each window holds what the run's history says, beside the origin with which training went on."""
    trajectory = Trajectory(folder)
    history = History(script, trajectory.kind.dtype)
    assert [w.origin_step for w in trajectory.index.windows] == [0, *sorted(script.begins)]
    assert sorted(s for w in trajectory.index.windows for s in w.steps) == sorted(script.observed)
    for number, record in enumerate(trajectory.index.windows):
        window, begun = trajectory.of_window(number), script.begins.get(record.origin_step, "plain")
        assert (record.jump, record.undone) == (
            jump_at(record.origin_step) if begun == "jump" else None,
            begun == "undone",
        )
        for shard in replay.origins(window):
            assert torch.equal(shard.data, part(history.gone_on[record.origin_step], shard))
        assert all(window_holding(trajectory, step).number == number for step in record.steps)
        known = [record.origin_step, *record.steps]
        for step, following in zip(known, [*record.steps, known[-1] + 1], strict=True):
            held, last, after = last_before(trajectory, following - 1)
            if held.number == number:  # else another window begins in between
                assert (last, after) == (step, begun != "plain" and step == record.origin_step)
        if begun != "plain":
            assert window_holding(trajectory, record.origin_step, after_jump=True).number == number
        if record.steps:
            check_rows(window, history)


def check_rows(window: Trajectory, history: History) -> None:
    origin = history.gone_on[window.record.origin_step]
    gram = replay.window(window).gram_LTT
    for i, name in enumerate(window.names):
        deltas = torch.stack([(history.trained[s][name] - origin[name]).double().flatten() for s in window.steps])
        if window.index.encoding in ("bf16", "fp32-none") or (not window.kind.keeps_rows and len(window.steps) <= 4):
            torch.testing.assert_close(gram[i], deltas @ deltas.T, rtol=1e-4, atol=1e-9)
    for step in window.steps if window.kind.keeps_rows else ():
        bound = replay.error_bound(window, step)
        for shard in replay.states(window, step):
            wrong = (shard.data.float() - part(history.trained[step], shard).float()).abs().max()
            assert wrong <= bound * 1.01 + 1e-7 * (bound > 0)


@pytest.mark.parametrize("kind", EVERY_KIND)
@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_a_run_that_was_killed_leaves_what_the_other_does(
    start: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, rng: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("run")
    there = script(rng, KINDS[kind].keeps_rows)
    observer = Driver(folder / "killed", start, kind, there).run()
    Driver(folder / "straight", start, kind, replace(there, kills=())).run()
    assert named_content(folder / "killed") == named_content(folder / "straight")
    check(folder / "killed", there)
    check_predictions(observer, Trajectory(folder / "killed"))


def check_predictions(observer: Observer, trajectory: Trajectory) -> None:
    """In the run and from the files alone, of the last window."""
    assert observer.steps == trajectory.steps
    if len(observer.steps) < 2:
        return
    prediction, last = Prediction("relex", 40), observer.steps[-1]
    online = {
        s.name: s.data for s in predicted_tensors(observer.histories(), observer.kind, observer.window(), prediction)
    }
    for shard in extrapolate(trajectory, last, prediction):
        assert torch.equal(online[shard.name], shard.data)


def drive(rank: int, world: int, out: Path, base: Path, runs: Sequence[tuple[str, Script]]) -> None:
    """Each killed and straight."""
    for i, (kind, there) in enumerate(runs):
        Driver(out / f"killed_{i}", base, kind, there, rank, world).run()
        Driver(out / f"straight_{i}", base, kind, replace(there, kills=()), rank, world).run()


def test_the_same_on_two_ranks(start: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    runs = [(kind, script(rng, KINDS[kind].keeps_rows)) for kind in EVERY_KIND * 6]
    assert sum(bool(there.kills) and bool(there.begins) for _, there in runs) > 12
    on_two_ranks(drive, tmp_path, start, runs)
    for i, (_, there) in enumerate(runs):
        assert named_content(tmp_path / f"killed_{i}") == named_content(tmp_path / f"straight_{i}")
        check(tmp_path / f"killed_{i}", there)


# ---------------------------------------------------------------- what can go wrong

JUMPED = Script(6, frozenset(range(1, 7)), frozenset(), {3: "jump"})


@pytest.fixture
def jumped(start: Path, tmp_path: Path) -> tuple[Driver, Path]:
    """A run that jumped after step 3, up to step 6, and the rank's folder of its second window."""
    driver = Driver(tmp_path / "trajectory", start, "fp32-int8", JUMPED)
    driver.run()
    return driver, tmp_path / "trajectory" / "window_001" / "rank_00000"


@pytest.mark.parametrize(("damaged", "left"), [(4, []), (5, [4])])
def test_rows_after_a_damaged_file_are_trained_again(
    jumped: tuple[Driver, Path], damaged: int, left: list[int]
) -> None:
    driver, rank_folder = jumped
    before = named_content(driver.folder)
    (rank_folder / f"step_{damaged:06d}.safetensors").write_bytes(b"")
    observer = driver.begin(6)
    assert (observer.steps, observer.replays) == (left, None)
    assert Trajectory(driver.folder, window=0).steps == [1, 2, 3]
    for step in range(len(left) + 4, 7):
        observer.observe(step, driver.source(driver.history.trained[step]))
    assert named_content(driver.folder) == before


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.parametrize("content", [None, b"", b"longer than a header, and no tensors in it"])
def test_a_damaged_origin_is_refused_with_the_cure(
    jumped: tuple[Driver, Path], content: bytes | None, step: int
) -> None:
    driver, rank_folder = jumped
    (rank_folder / "origin.safetensors").unlink()
    if content is not None:
        (rank_folder / "origin.safetensors").write_bytes(content)
    index = (driver.folder / "index.json").read_text()
    cure = "began at step 3 is lost: resume from a checkpoint before that step .*, or give this run its own"
    with pytest.raises(TrajectoryError, match=cure):
        driver.begin(step)
    assert (driver.folder / "index.json").read_text() == index
    assert driver.begin(2).steps == [1, 2]
    assert not rank_folder.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 1}'])
def test_damaged_placements_are_refused(jumped: tuple[Driver, Path], content: str) -> None:
    driver, rank_folder = jumped
    (rank_folder / "placements.json").write_text(content)
    with pytest.raises(TrajectoryError, match=r"placements\.json is damaged|holds \[\d+\] elements"):
        driver.begin(5)


def test_an_undone_jump_may_begin_at_the_same_step(jumped: tuple[Driver, Path]) -> None:
    """Before anything was trained from the jumped weights: two windows from step 3, the second is gone on with."""
    driver, _ = jumped
    observer = driver.begin(3)
    assert observer.replays is not None
    assert observer.replays.jump == jump_at(3)
    observer.begin_window(3, driver.source(driver.history.trained[3]), undone=True)
    assert observer.replays is None
    observer.observe(4, driver.source(driver.history.trained[4]))
    assert [(w.origin_step, w.steps) for w in observer.trajectory.index.windows] == [(0, [1, 2, 3]), (3, []), (3, [4])]
    resumed = Observer(driver.folder, str(driver.base), {}, {"project": "p", "experiment": "e"}, driver.kind)
    resumed.start(driver.source(BASE))
    resumed.open(3)
    assert resumed.replays is not None
    assert resumed.replays.undone
    for shard in resumed.origin_shards():
        assert torch.equal(shard.data, part(driver.history.trained[3], shard))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_window_takes_the_memory_of_the_one_before(start: Path, tmp_path: Path, kind: str) -> None:
    driver = Driver(tmp_path, start, kind, replace(JUMPED, begins={}))
    observer = driver.run()
    states = {name: held.state.data_ptr() for name, held in observer.held.items()}
    observer.begin_window(6, driver.source(driver.history.trained[6]), jump_at(6))
    assert {name: held.state.data_ptr() for name, held in observer.held.items()} == states
    assert (observer.steps, float(observer.stored_L.sum())) == ([], 0.0)
    assert getattr(observer.collector, "packed", []) == []


@pytest.mark.parametrize(
    ("step", "jump", "undone", "says"),
    [
        (2, None, False, "a window cannot begin at step 2: the one before it goes up to step 6"),
        (6, {**jump_at(6), "target": 6}, False, "a jump at step 6 cannot have target 6"),
        (6, {"method": "relex"}, False, "a jump has to say method, target, rank, fit_from, optimizer"),
        (6, jump_at(6), True, "begins with a jump, with the undoing of one, or with neither"),
    ],
)
def test_a_window_that_cannot_begin_changes_nothing(
    jumped: tuple[Driver, Path], step: int, jump: dict | None, undone: bool, says: str
) -> None:
    driver, _ = jumped
    observer, before = driver.begin(6), named_content(driver.folder)
    with pytest.raises(TrajectoryError, match=says):
        observer.begin_window(step, driver.source(driver.history.trained[6]), jump, undone)
    assert named_content(driver.folder) == before
    observer.observe(7, driver.source(driver.history.trained[6]))
    assert observer.steps == [4, 5, 6, 7]


def fail_on_one_rank(rank: int, world: int, out: Path, base: Path, kind: str) -> None:
    """Rank 1 meets NaN: neither takes another step, and the window before is all that counts."""
    driver = Driver(out, base, kind, JUMPED, rank, world)
    observer = driver.begin(0)
    driver.train(observer, 0, 3, "saved")
    weights = driver.history.gone_on[3]
    wrong = {name: tensor * torch.nan for name, tensor in weights.items()} if rank else weights
    with pytest.raises(ValueError if rank else PeerError):
        observer.begin_window(3, driver.source(wrong), jump_at(3))
    for work in (lambda: observer.observe(4, driver.source(driver.history.trained[4])), observer.save, observer.window):
        with pytest.raises(RuntimeError, match="resume from the one on disk"):
            work()
    assert driver.begin(3).trajectory.number == 1  # resumed: the window is begun again


@pytest.mark.parametrize("kind", ["bf16", "sketch-4"])
def test_a_window_that_fails_on_one_rank_fails_on_all(start: Path, tmp_path: Path, kind: str) -> None:
    on_two_ranks(fail_on_one_rank, tmp_path, start, kind)
    assert [w.steps for w in Trajectory(tmp_path).index.windows] == [[1, 2, 3], []]


def test_a_checkpoint_of_an_attempt_that_was_given_up_is_refused(start: Path, tmp_path: Path) -> None:
    """Its weights come from a jump that the trajectory does not know any more: the next row would hold it unseen."""
    there = Script(8, frozenset(range(1, 9)), frozenset({2, 6}), {4: "jump"})
    driver = Driver(tmp_path, start, "fp32-int8", there)
    driver.run()
    back = driver.begin(2)  # by hand, to do something else from there on
    back.observe(3, driver.source(driver.history.trained[3]))
    with pytest.raises(TrajectoryError, match=r"resumed before step 4, .* give the checkpoint of step 3 or one before"):
        driver.begin(6)
    again = driver.begin(2)
    driver.train(again, 2, 6, "")
    assert driver.begin(6).steps == [5, 6]  # of the new attempt
