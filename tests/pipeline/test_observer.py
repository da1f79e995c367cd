"""The pipeline below verl, on one process and on two gloo ranks, against dense float64 computations."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource
from pipeline import PREDICTION, RUN, STEPS, on_two_ranks, predicted, train, train_rank, weights_of
from recorded import random_weights, write_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from relex_verl.maths.diagnostics import describe
from relex_verl.maths.extrapolators import METHODS, Prediction
from relex_verl.pipeline.collectives import PeerError
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate, predicted_tensors, write_checkpoint
from relex_verl.trajectory import replay
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard, whole
from relex_verl.trajectory.store import Trajectory


def dense_prediction(states: list[dict[str, torch.Tensor]], steps: list[int], target: int) -> dict[str, torch.Tensor]:
    """The paper's Algorithm 2 by a dense float64 SVD of every tensor's trajectory."""
    predicted = {}
    for name, origin in states[0].items():
        deltas = torch.stack([(state[name].double() - origin.double()).flatten() for state in states[1:]])
        if not deltas.any():
            predicted[name] = origin
            continue
        left, sigma, right = torch.linalg.svd(deltas, full_matrices=False)
        times = torch.tensor(steps, dtype=torch.float64)
        design = torch.stack([times, torch.ones_like(times)], 1)
        slope, intercept = torch.linalg.lstsq(design, (left[:, 0] * sigma[0]).unsqueeze(1)).solution.flatten()
        predicted[name] = origin.double() + ((slope * target + intercept) * right[0]).view_as(origin)
    return predicted


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_prediction_is_the_dense_one(base: Path, two_ranks: dict[str, Path], world: int, tmp_path: Path) -> None:
    out = two_ranks["bf16"] if world == 2 else tmp_path
    if world == 1:
        train(out, base, "bf16")
    model = DriftingModel(weights_of(base))
    states = [{name: w.to(torch.bfloat16) for name, w in model.at(step).items()} for step in [0, *STEPS]]
    expected = dense_prediction(states, STEPS, PREDICTION.target)
    written = {}
    for file in (out / PREDICTION.folder_name).glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == expected.keys()
    total = sum(one.numel() for one in written.values())
    wrong = sum(int((written[name] != expected[name].to(torch.bfloat16)).sum()) for name in written)
    assert wrong <= 1e-5 * total
    trajectory = Trajectory(out / "trajectory")
    gram = replay.window(trajectory).gram_LTT
    for i, name in enumerate(trajectory.names):
        deltas = torch.stack([(s[name].double() - states[0][name].double()).flatten() for s in states[1:]])
        torch.testing.assert_close(
            gram[i], deltas @ deltas.T, rtol=1e-12, atol=1e-12 * float((deltas @ deltas.T).max())
        )


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8", "sketch-4"])
def test_ranks_do_not_matter(base: Path, two_ranks: dict[str, Path], kind: str, tmp_path: Path) -> None:
    train(tmp_path, base, kind)
    differing = total = 0
    for file in (tmp_path / PREDICTION.folder_name).glob("*.safetensors"):
        one, two = load_file(file), load_file(two_ranks[kind] / PREDICTION.folder_name / file.name)
        differing += sum(int((one[name] != two[name]).sum()) for name in one)
        total += sum(tensor.numel() for tensor in one.values())
    # Groups of 64 start at the same elements however rows or (multiples of 64) columns are cut: equal, not nearly equal.
    # The moments' Gram matrix is added up in another order: nearly equal.
    assert total > 100_000
    assert differing <= (1e-4 * total if kind == "sketch-4" else 0)


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8", "sketch-4"])
def test_offline_gives_the_same_bits(two_ranks: dict[str, Path], kind: str, tmp_path: Path) -> None:
    run = two_ranks[kind]
    trajectory = Trajectory(run / "trajectory")
    write_checkpoint(trajectory, extrapolate(trajectory, STEPS[-1], PREDICTION), tmp_path / "offline")
    for file in (run / PREDICTION.folder_name).glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "offline" / file.name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "offline")


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8"])
def test_resume_drops_what_the_checkpoint_did_not_see(base: Path, kind: str, tmp_path: Path) -> None:
    """Killed at step 6 after a checkpoint at step 3: rows 5 and 6 are trained again and the result is the same."""
    straight = train(tmp_path / "straight", base, kind)
    train(tmp_path / "killed", base, kind, steps=[1, 2, 3, 5, 6])
    model = DriftingModel(weights_of(base))
    observer = Observer(tmp_path / "killed" / "trajectory", str(base), {}, RUN, KINDS[kind])
    observer.start(RankSource(model.at(0)))
    observer.open(3)
    assert observer.steps == [1, 2, 3]
    for step in [5, 6, 9, 10]:
        observer.observe(step, RankSource(model.at(step)))
    torch.testing.assert_close(observer.window().gram_LTT, straight.window().gram_LTT, rtol=1e-13, atol=0)
    for one, other in zip(predicted(observer), predicted(straight), strict=True):
        assert torch.equal(one.data, other.data)
    assert Trajectory(tmp_path / "killed" / "trajectory").steps == STEPS


def test_groups_that_start_elsewhere_change_next_to_nothing(base: Path, tmp_path: Path) -> None:
    """A small tensor over two ranks: the second one's groups of 64 are not those of the whole tensor."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a.weight": torch.randn(96, 5, generator=generator).bfloat16(),
        "b.weight": torch.randn(256, 256, generator=generator).bfloat16(),
    }
    odd = tmp_path / "odd"
    odd.mkdir()
    save_file(weights, odd / "model.safetensors", {"format": "pt"})
    on_two_ranks(train_rank, tmp_path / "two", odd, "fp32-int8")
    train(tmp_path / "one", odd, "fp32-int8")
    one, two = (load_file(tmp_path / run / PREDICTION.folder_name / "model.safetensors") for run in ("one", "two"))
    equal = sum(int((one[name] == two[name]).sum()) for name in one)
    assert equal >= 0.9999 * sum(one.numel() for one in weights.values())


def refuse_for_lack_of_memory(rank: int, world: int, base: Path, out: Path) -> None:
    """Asked before memory is taken, with what this rank would hold."""
    asked = []

    def admit(elements: int, tensors: int) -> None:
        asked.append((elements, tensors))
        raise MemoryError("no")

    weights = weights_of(base)
    observer = Observer(out / "trajectory", str(base), {}, RUN, KINDS["bf16"])
    with pytest.raises(MemoryError):
        observer.start(RankSource(weights, rank, world), admit)
    assert observer.held == {}
    ((elements, tensors),) = asked
    assert tensors == len(weights)
    assert 0.4 < elements / sum(one.numel() for one in weights.values()) < 0.6


def test_a_run_that_does_not_fit_is_refused_before_memory_is_taken(base: Path, tmp_path: Path) -> None:
    on_two_ranks(refuse_for_lack_of_memory, base, tmp_path)


def fail_on_one_rank(rank: int, world: int, base: Path, out: Path) -> None:
    """Rank 1 meets NaN: both ranks get an error, none waits, nothing of the step is kept."""
    model = DriftingModel(weights_of(base))
    observer = Observer(out / "trajectory", str(base), {}, RUN, KINDS["bf16"])
    observer.start(RankSource(model.at(0), rank, world))
    observer.open(0)
    observer.observe(1, RankSource(model.at(1), rank, world))
    weights = model.at(2)
    if rank == 1:
        weights = {name: tensor * float("nan") for name, tensor in weights.items()}
    with pytest.raises(ValueError if rank == 1 else PeerError):
        observer.observe(2, RankSource(weights, rank, world))
    observer.observe(2, RankSource(model.at(2), rank, world))
    assert observer.steps == [1, 2]


def test_an_error_on_one_rank_is_an_error_on_all(base: Path, tmp_path: Path) -> None:
    on_two_ranks(fail_on_one_rank, base, tmp_path)
    assert Trajectory(tmp_path / "trajectory").steps == [1, 2]


def leave_a_gap(rank: int, world: int, base: Path, out: Path) -> None:
    """Both ranks hold the first half only: the rest would be missing from every prediction."""
    observer = Observer(out / "trajectory", str(base), {}, RUN, KINDS["bf16"])
    with pytest.raises(ValueError, match=r"gap|end at element"):
        observer.start(RankSource(weights_of(base), 0, world))


def test_a_gap_between_the_shards_is_refused(base: Path, tmp_path: Path) -> None:
    on_two_ranks(leave_a_gap, base, tmp_path)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["bf16", "fp32-int8", "fp32-none", "sketch-2"])
def test_numbers_that_are_none_and_steps_that_do_not_ascend(
    base: Path, tmp_path: Path, kind: str, poison: float
) -> None:
    """The error names the tensor, of rows nothing is kept, and steps that the run skips are no matter."""
    model, observer = DriftingModel(weights_of(base)), Observer(tmp_path, str(base), {}, RUN, KINDS[kind])
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    observer.observe(2, RankSource(model.at(2)))
    observer.observe(7, RankSource(model.at(7)))
    for step in (7, 3):
        with pytest.raises(ValueError, match=f"step {step} comes after step 7 was observed"):
            observer.observe(step, RankSource(model.at(8)))
    bad = model.at(8)
    name = list(bad)[3]
    bad[name].view(-1)[5] = poison
    with pytest.raises(ValueError, match=f"{name}: weights are not finite"):
        observer.observe(8, RankSource(bad))
    if observer.kind.keeps_rows:
        observer.observe(9, RankSource(model.at(9)))
        assert Trajectory(tmp_path).steps == [2, 7, 9]


@pytest.mark.parametrize("kind", ["bf16", "fp32-int8", "sketch-4"])
def test_a_run_that_never_moves_and_one_of_few_rows(base: Path, tmp_path: Path, kind: str) -> None:
    """No movement predicts the base, bit for bit; too few rows are refused with their number; no figure is made up."""
    model = DriftingModel(weights_of(base))
    for name, rate in (("still", 0.0), ("moves", 1e-3)):
        model.rate, observer = rate, Observer(tmp_path / name, str(base), {}, RUN, KINDS[kind])
        observer.start(RankSource(model.at(0)))
        observer.open(0)
        for rows, step in enumerate((1, 4), 1):
            observer.observe(step, RankSource(model.at(step)))
            window = observer.window()
            figures = describe(window)
            for method in observer.kind.methods:
                shards = predicted_tensors(observer.histories(), observer.kind, window, Prediction(method, 40))
                if rows < METHODS[method].min_rows:
                    with pytest.raises(ValueError, match=str(METHODS[method].min_rows)):
                        next(shards)
                    continue
                for shard in shards:
                    assert shard.data.isfinite().all()
                    if not rate:
                        assert torch.equal(shard.data, weights_of(base)[shard.name].flatten()), (method, shard.name)
            if not rate:
                assert all(values.isnan().all() for values in figures.values()), figures


class Fickle:
    """An engine that hands out its weights in another way from some pass on: to name them, to copy them, then each step."""

    def __init__(self, weights: dict[str, torch.Tensor], change: str, at: int) -> None:
        self.weights, self.change, self.left = weights, change, at

    def __iter__(self) -> Iterator[TensorShard]:
        self.left -= 1
        names = list(self.weights)
        if self.left < 0:
            names = {"lost": names[:-1], "order": names[::-1], "twice": [*names, names[0]]}.get(self.change, names)
        if self.left < 0 and self.change == "new":
            yield TensorShard("another.weight", (2,), whole((2,)), torch.zeros(2))
        if self.left < 0 and self.change == "shape":
            self.weights = {**self.weights, names[0]: self.weights[names[0]][:1]}
        for name in names:
            yield TensorShard(
                name, tuple(self.weights[name].shape), whole(self.weights[name].shape), self.weights[name].flatten()
            )


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("lost", f"{list(random_weights())[-1]} is gone: .*handed out 5 of the 6"),
        ("order", "orders its"),
        ("twice", "orders its"),
        ("new", r"another\.weight: .*did not have before"),
        ("shape", f"{next(iter(random_weights()))}: .*cuts or orders its"),
    ],
)
def test_weights_that_come_in_another_way_are_refused(tmp_path: Path, change: str, says: str, at: int) -> None:
    weights = random_weights()
    observer = Observer(
        tmp_path / "trajectory", str(write_base(tmp_path / "base", weights)), {}, {}, KINDS["fp32-int8"]
    )
    source = Fickle(weights, change, at)
    with pytest.raises(ValueError, match=says):
        observe_a_step(observer, source)
    assert observer.steps == []


def observe_a_step(observer: Observer, source: Fickle) -> None:
    observer.start(source)
    observer.open(0)
    observer.observe(1, source)
