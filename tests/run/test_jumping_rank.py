"""A jump on one rank, with weights in memory for an engine (verl's real ones: tests/verl_plugin/test_jumping_engines.py)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import RUN, weights_of

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.observer import Observer
from relex_verl.run.jumping_rank import JumpingRank
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard
from relex_verl.trajectory.store import Trajectory

CUT = 4


class Engine:
    """Float32 weights in memory, and an optimizer that keeps one number for each."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = {name: tensor.clone() for name, tensor in weights.items()}
        self.momentum = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
        self.resets = 0

    def __iter__(self) -> Iterator[TensorShard]:
        return iter(RankSource(self.weights))

    def assign(self, shards: Sequence[TensorShard]) -> None:
        assert [shard.name for shard in shards] == list(self.weights)
        for shard in shards:
            self.weights[shard.name].view(-1).copy_(shard.data)

    def reset_optimizer(self) -> None:
        self.resets += 1

    def state(self) -> Mapping[str, torch.Tensor]:
        weights = {f"weight.{name}": tensor for name, tensor in self.weights.items()}
        return weights | {f"state.{name}": tensor for name, tensor in self.momentum.items()}

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class Samples:
    """Tokens whose log-probability is a weight of the engine, each; the second look at them may fail."""

    def __init__(self, engine: Engine, fails: bool = False) -> None:
        self.engine, self.fails, self.looks = engine, fails, 0

    def keep(self, step: int, file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(step))

    def log_probs(self, step: int, file: Path) -> torch.Tensor:
        assert file.read_text() == str(step)
        self.looks += 1
        if self.fails and self.looks == 2:
            raise RuntimeError("out of memory")
        return torch.cat([tensor.flatten() for tensor in self.engine.weights.values()]).double()


def at_a_cut(folder: Path, base: Path, kind: str, rate: float = 1e-4) -> tuple[Engine, JumpingRank, Observer]:
    """Every weight drifts, some never move."""
    model = DriftingModel(weights_of(base), rate=rate)
    engine = Engine(model.at(0))
    observer = Observer(folder / "trajectory", str(base), {}, RUN, KINDS[kind])
    observer.start(engine)
    observer.open(0)
    for step in range(1, CUT + 1):
        for name, tensor in model.at(step).items():
            engine.weights[name].copy_(tensor)
        observer.observe(step, engine)
    return engine, JumpingRank(engine, observer, engine, folder / "before_jump"), observer  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["fp32-int8", "sketch-4"])
def test_the_policy_is_compared_with_weights_that_are_set_for_as_long_as_that(
    tmp_path: Path, base: Path, kind: str, fails: bool
) -> None:
    engine, rank, observer = at_a_cut(tmp_path, base, kind)
    samples = rank._samples = Samples(engine, fails)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    rank.keep_samples(CUT)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            rank.kl(CUT, Prediction("relex", 12))
    else:
        kl = rank.kl(CUT, Prediction("relex", 12))
    assert samples.looks == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())
    assert len(Trajectory(observer.folder).index.windows) == 1
    if not fails:
        rank.jump(CUT, Prediction("relex", 12), "keep", undoable=False)
        moved = torch.cat([(tensor - before[f"weight.{n}"]).flatten() for n, tensor in engine.weights.items()]).double()
        assert kl == pytest.approx(float((moved.exp() - 1 - moved).mean()), rel=1e-3)


@pytest.fixture(params=["fp32-int8", "fp32-none", "sketch-4"])
def run(request: pytest.FixtureRequest, tmp_path: Path, base: Path) -> tuple[Engine, JumpingRank, Observer]:
    """Of each kind that follows float32 weights."""
    return at_a_cut(tmp_path, base, request.param)


def test_frozen_weights_stay_bit_for_bit(run: tuple[Engine, JumpingRank, Observer]) -> None:
    engine, rank, observer = run
    before = {name: tensor.clone() for name, tensor in engine.weights.items()}
    distance = rank.jump(CUT, Prediction("relex", 12), "keep", undoable=False)
    for name, tensor in engine.weights.items():
        assert torch.equal(tensor, before[name]) == ("norm" in name)
    true = sum(float((tensor - before[name]).double().square().sum()) for name, tensor in engine.weights.items()) ** 0.5
    if observer.kind.keeps_rows:  # a sketch knows theta_0, not where the weights stand now
        assert distance == pytest.approx(true, rel=1e-2)
    assert engine.resets == 0
    assert not rank._kept.exists()
    assert (observer.steps, observer.trajectory.record.origin_step) == ([], CUT)


def test_a_prediction_that_is_not_finite_is_no_jump(tmp_path: Path, base: Path) -> None:
    engine, rank, observer = at_a_cut(tmp_path, base, "fp32-int8", rate=1e36)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    with pytest.raises(ValueError, match="is not finite in"):
        rank.jump(CUT, Prediction("relex", 10**4), "reset", undoable=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())
    assert engine.resets == 0
    assert len(Trajectory(observer.folder).index.windows) == 1


def test_what_was_kept_and_is_gone_or_damaged_undoes_nothing(run: tuple[Engine, JumpingRank, Observer]) -> None:
    engine, rank, _ = run
    rank.jump(CUT, Prediction("relex", 12), "keep", undoable=True)
    jumped = {name: tensor.clone() for name, tensor in engine.state().items()}
    rank._kept.write_bytes(rank._kept.read_bytes()[:100])
    with pytest.raises(Exception, match=r".+"):
        rank.undo(CUT + 1)
    rank._kept.unlink()
    with pytest.raises(OSError, match="No such file"):
        rank.undo(CUT + 1)
    assert all(torch.equal(tensor, jumped[name]) for name, tensor in engine.state().items())


def test_a_window_without_a_jump_is_not_made_again(run: tuple[Engine, JumpingRank, Observer]) -> None:
    _engine, rank, observer = run
    rank.begin(CUT)
    assert rank.replay() is None
    observer.open(CUT)
    assert rank.replay() is None
