"""The pipeline below verl, on one process and on two gloo ranks, against dense float64 computations."""

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import DriftingModel, RankSource, tiny_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from relex_verl import replay
from relex_verl.assembly import whole_tensors
from relex_verl.collectives import PeerError
from relex_verl.diagnostics import describe
from relex_verl.encodings import ENCODINGS
from relex_verl.hf_checkpoint import BaseCheckpoint
from relex_verl.observer import Observer
from relex_verl.prediction import Prediction, extrapolate, write_checkpoint
from relex_verl.shards import TensorShard
from relex_verl.trajectory import Trajectory, TrajectoryError

RUN = {"project": "p", "experiment": "e"}
STEPS = [1, 2, 3, 5, 6, 9, 10]
PREDICTION = Prediction("relex", 40)


def weights_of(base: Path) -> dict[str, torch.Tensor]:
    checkpoint = BaseCheckpoint(base)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def train(out: Path, base: Path, encoding: str, rank: int = 0, world: int = 1, steps: list[int] = STEPS) -> Observer:
    """Observe a drifting model and write one prediction, as a rank of a run does."""
    model = DriftingModel(weights_of(base))
    observer = Observer(out / "trajectory", str(base), {}, RUN, encoding)
    observer.start(RankSource(model.at(0), rank, world))
    observer.open(0)
    for step in steps:
        observer.observe(step, RankSource(model.at(step), rank, world))
    observer.save()
    observer.write_prediction(PREDICTION, out / PREDICTION.folder_name, {"method": "relex"})
    return observer


def rank_main(rank: int, world: int, work: str, port: int, *args: object) -> None:
    dist.init_process_group("cpu:gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    globals()[work](rank, world, *args)
    dist.destroy_process_group()


def on_two_ranks(work: str, *args: object) -> None:
    with __import__("socket").socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, args=(2, work, port, *args), nprocs=2)


def train_rank(rank: int, world: int, out: Path, base: Path, encoding: str) -> None:
    train(out, base, encoding, rank, world)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"), shard_size="200KB")


@pytest.fixture(scope="module")
def two_ranks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on two ranks for each kind of trajectory."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bf16", "fp32-int8", "sketch-4")}
    for name, folder in folders.items():
        on_two_ranks("train_rank", folder, base, name)
    return folders


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
    gram = replay.gram(trajectory)
    for i, name in enumerate(trajectory.names):
        deltas = torch.stack([(s[name].double() - states[0][name].double()).flatten() for s in states[1:]])
        torch.testing.assert_close(
            gram[i], deltas @ deltas.T, rtol=1e-12, atol=1e-12 * float((deltas @ deltas.T).max())
        )


@pytest.mark.parametrize("encoding", ["bf16", "fp32-int8", "sketch-4"])
def test_ranks_do_not_matter(base: Path, two_ranks: dict[str, Path], encoding: str, tmp_path: Path) -> None:
    train(tmp_path, base, encoding)
    differing = total = 0
    for file in (tmp_path / PREDICTION.folder_name).glob("*.safetensors"):
        one, two = load_file(file), load_file(two_ranks[encoding] / PREDICTION.folder_name / file.name)
        differing += sum(int((one[name] != two[name]).sum()) for name in one)
        total += sum(tensor.numel() for tensor in one.values())
    # Groups of 64 start at the same elements however rows or (multiples of 64) columns are cut: equal, not nearly equal.
    # The moments' Gram matrix is added up in another order: nearly equal.
    assert total > 100_000
    assert differing <= (1e-4 * total if encoding == "sketch-4" else 0)


@pytest.mark.parametrize("encoding", ["bf16", "fp32-int8", "sketch-4"])
def test_offline_gives_the_same_bits(two_ranks: dict[str, Path], encoding: str, tmp_path: Path) -> None:
    run = two_ranks[encoding]
    trajectory = Trajectory(run / "trajectory")
    write_checkpoint(trajectory, extrapolate(trajectory, STEPS[-1], PREDICTION), tmp_path / "offline")
    for file in (run / PREDICTION.folder_name).glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "offline" / file.name).read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "offline")


def test_states_are_bit_for_bit(base: Path, two_ranks: dict[str, Path]) -> None:
    trajectory, model = Trajectory(two_ranks["bf16"] / "trajectory"), DriftingModel(weights_of(base))
    for step in [0, *STEPS]:
        expected, seen = model.at(step), dict.fromkeys(trajectory.names, 0)
        for shard in replay.states(trajectory, step):
            flat = expected[shard.name].to(torch.bfloat16).flatten()
            for local, full, length in shard.placement.runs():
                part = shard.data[local : local + length]
                assert torch.equal(part.view(torch.int16), flat[full : full + length].view(torch.int16))
            seen[shard.name] += shard.placement.numel
        assert seen == {name: tensor.numel() for name, tensor in expected.items()}


@pytest.mark.parametrize("encoding", ["bf16", "fp32-int8"])
def test_resume_drops_what_the_checkpoint_did_not_see(base: Path, encoding: str, tmp_path: Path) -> None:
    """Killed at step 6 after a checkpoint at step 3: rows 5 and 6 are trained again and the result is the same."""
    straight = train(tmp_path / "straight", base, encoding)
    train(tmp_path / "killed", base, encoding, steps=[1, 2, 3, 5, 6])
    model = DriftingModel(weights_of(base))
    observer = Observer(tmp_path / "killed" / "trajectory", str(base), {}, RUN, encoding)
    observer.start(RankSource(model.at(0)))
    observer.open(3)
    assert observer.steps == [1, 2, 3]
    for step in [5, 6, 9, 10]:
        observer.observe(step, RankSource(model.at(step)))
    torch.testing.assert_close(observer.gram(), straight.gram(), rtol=1e-13, atol=0)
    for one, other in zip(observer.predicted_tensors(PREDICTION), straight.predicted_tensors(PREDICTION), strict=True):
        assert torch.equal(one.data, other.data)
    assert Trajectory(tmp_path / "killed" / "trajectory").steps == STEPS


def test_a_file_without_its_index_entry_is_ignored(base: Path, tmp_path: Path) -> None:
    """SIGKILL between the file and the index: the step does not count, and its file is overwritten by the next try."""
    train(tmp_path, base, "bf16", steps=[1, 2, 3])
    index = tmp_path / "trajectory" / "index.json"
    content = json.loads(index.read_text())
    content["windows"][0]["steps"] = [1, 2]
    index.write_text(json.dumps(content))
    model = DriftingModel(weights_of(base))
    observer = Observer(tmp_path / "trajectory", str(base), {}, RUN)
    observer.start(RankSource(model.at(0)))
    observer.open(3)
    assert observer.steps == [1, 2]
    observer.observe(3, RankSource(model.at(3)))
    assert Trajectory(tmp_path / "trajectory").steps == [1, 2, 3]


def test_origin_that_is_not_the_base_is_stored(base: Path, tmp_path: Path) -> None:
    start = {name: tensor.float() + 0.5 for name, tensor in weights_of(base).items()}
    observer = Observer(tmp_path / "trajectory", str(base), {}, RUN)
    observer.start(RankSource(start))
    observer.open(0)
    moved = {name: tensor * 1.01 for name, tensor in start.items()}
    observer.observe(1, RankSource(moved))
    trajectory = Trajectory(tmp_path / "trajectory")
    assert trajectory.window.origin == "stored"
    for step, expected in ((0, start), (1, moved)):
        for shard in replay.states(trajectory, step):
            assert torch.equal(shard.data, expected[shard.name].to(torch.bfloat16).flatten())


def test_groups_that_start_elsewhere_change_next_to_nothing(base: Path, tmp_path: Path) -> None:
    """A small tensor over two ranks: the second one's groups of 64 are not those of the whole tensor."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a.weight": torch.randn(96, 5, generator=generator),
        "b.weight": torch.randn(256, 256, generator=generator),
    }
    odd = tmp_path / "odd"
    odd.mkdir()
    save_file(weights, odd / "model.safetensors", {"format": "pt"})
    on_two_ranks("train_rank", tmp_path / "two", odd, "fp32-int8")
    train(tmp_path / "one", odd, "fp32-int8")
    one, two = (load_file(tmp_path / run / PREDICTION.folder_name / "model.safetensors") for run in ("one", "two"))
    equal = sum(int((one[name] == two[name]).sum()) for name in one)
    assert equal >= 0.9999 * sum(one.numel() for one in weights.values())


def test_a_sketch_predicts_what_all_rows_predict(base: Path, tmp_path: Path) -> None:
    """And says what it cannot give."""
    exact, sketch = (train(tmp_path / name, base, name) for name in ("fp32-none", "sketch-4"))
    model = DriftingModel(weights_of(base))
    wrong = total = 0.0
    for one, other in zip(exact.predicted_tensors(PREDICTION), sketch.predicted_tensors(PREDICTION), strict=True):
        origin = model.base[one.name].flatten()
        wrong += float((one.data.float() - other.data.float()).square().sum())
        total += float((one.data.float() - origin).square().sum())
    assert wrong**0.5 <= 0.01 * total**0.5
    energy, gram = sketch.energy(), exact.gram()
    torch.testing.assert_close(energy, gram.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-6, atol=1e-12)
    given, true = (describe(one.gram(), STEPS, 1, one.energy()) for one in (sketch, exact))
    share, exact_share = given["explained_variance"], true["explained_variance"]
    moved = exact_share.isfinite()
    assert torch.equal(share.isfinite(), moved)
    assert bool((share[moved] <= exact_share[moved] + 1e-6).all())
    assert given["line_r2"].isnan().all()
    trajectory = Trajectory(tmp_path / "sketch-4" / "trajectory")
    with pytest.raises(TrajectoryError, match="is a sketch"):
        next(replay.states(trajectory, 5))
    with pytest.raises(TrajectoryError, match="can be cut only where it was stored: at 10"):
        trajectory.steps_until(5)
    with pytest.raises(
        ValueError, match="two-point cannot be predicted from a sketch of size 4: use relex, raw-ols, poly"
    ):
        next(extrapolate(trajectory, 10, Prediction("two-point", 40)))
    assert sum(shard.placement.numel for shard in replay.states(trajectory, 0)) == trajectory.elements


def test_a_sketch_keeps_its_size(base: Path, tmp_path: Path) -> None:
    """In memory and on disk, however many steps; two files, so that a run killed while saving can go back one."""
    model, observer = DriftingModel(weights_of(base)), Observer(tmp_path, str(base), {}, RUN, "sketch-4")
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    sizes = []
    for step in range(1, 13):
        observer.observe(step, RankSource(model.at(step)))
        if step % 3 == 0:
            observer.save()
            sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("step_*")))
    elements = sum(prod(shape) for shape in observer.shapes.values())
    assert sorted(path.name for path in tmp_path.rglob("step_*")) == [
        "step_000009.safetensors",
        "step_000012.safetensors",
    ]
    assert sizes[-1] == pytest.approx(sizes[1], rel=0.01)
    assert sizes[-1] / 2 == pytest.approx(16 * elements, rel=0.02)


def test_a_sketch_resumes_from_its_last_file(base: Path, tmp_path: Path) -> None:
    """The steps after the file are lost with the process: a gap in the window, which a least-squares fit can have."""
    model, folder = DriftingModel(weights_of(base)), tmp_path / "trajectory"

    def begin(step: int) -> Observer:
        observer = Observer(folder, str(base), {}, RUN, "sketch-4")
        observer.start(RankSource(model.at(0)))
        observer.open(step)
        return observer

    killed = begin(0)
    for step in (1, 2, 3, 5):
        killed.observe(step, RankSource(model.at(step)))
        if step in (2, 3):
            killed.save()
    resumed = begin(3)
    assert resumed.steps == [1, 2, 3]
    for step in (5, 6, 9, 10):
        resumed.observe(step, RankSource(model.at(step)))
    straight = train(tmp_path / "straight", base, "sketch-4")
    torch.testing.assert_close(resumed.gram(), straight.gram(), rtol=1e-6, atol=1e-12)
    assert begin(2).steps == [1, 2]  # and back to the file before
    assert begin(1).steps == []


def test_a_failed_step_of_a_sketch_ends_it(base: Path, tmp_path: Path) -> None:
    """The moments are half updated: what follows must not look as if nothing had been."""
    model, observer = DriftingModel(weights_of(base)), Observer(tmp_path, str(base), {}, RUN, "sketch-4")
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    observer.observe(1, RankSource(model.at(1)))
    observer.save()
    last = list(weights_of(base))[-1]
    with pytest.raises(ValueError, match="not finite"):
        observer.observe(2, RankSource({**model.at(2), last: model.at(2)[last] * torch.nan}))
    with pytest.raises(RuntimeError, match="half-way"):
        observer.observe(2, RankSource(model.at(2)))
    assert Trajectory(tmp_path).steps == [1]


@pytest.mark.parametrize("encoding", ["bf16", "fp32-int8"])
def test_files_that_a_crashed_node_left_empty_are_trained_again(base: Path, encoding: str, tmp_path: Path) -> None:
    train(tmp_path, base, encoding, steps=[1, 2, 3, 5])
    (tmp_path / "trajectory" / "rank_00000" / "step_000003.safetensors").write_bytes(b"")
    model = DriftingModel(weights_of(base))
    observer = Observer(tmp_path / "trajectory", str(base), {}, RUN, encoding)
    observer.start(RankSource(model.at(0)))
    observer.open(5)
    assert observer.steps == [1, 2]


def refuse_for_lack_of_memory(rank: int, world: int, base: Path, out: Path) -> None:
    """Asked before memory is taken, with what this rank would hold."""
    asked = []

    def admit(elements: int, tensors: int) -> None:
        asked.append((elements, tensors))
        raise MemoryError("no")

    weights = weights_of(base)
    observer = Observer(out / "trajectory", str(base), {}, RUN)
    with pytest.raises(MemoryError):
        observer.start(RankSource(weights, rank, world), admit)
    assert observer.held == {}
    ((elements, tensors),) = asked
    assert tensors == len(weights)
    assert 0.4 < elements / sum(one.numel() for one in weights.values()) < 0.6


def test_a_run_that_does_not_fit_is_refused_before_memory_is_taken(base: Path, tmp_path: Path) -> None:
    on_two_ranks("refuse_for_lack_of_memory", base, tmp_path)


def fail_while_weights_are_put_together(rank: int, world: int, base: Path, out: Path) -> None:
    """Rank 1's shards fail in the middle: both ranks hear of it at the end, none waits in a collective."""
    observer = Observer(out / "trajectory", str(base), {}, RUN)
    source = RankSource(DriftingModel(weights_of(base)).at(1), rank, world)
    observer.start(source)

    def broken() -> Iterator[TensorShard]:
        for i, shard in enumerate(observer.observed_now(source)):
            if rank == 1 and i == 3:
                raise OSError("gone")
            yield shard

    handed = []
    with pytest.raises(OSError if rank == 1 else PeerError):
        handed += [name for name, _ in whole_tensors(observer.shapes, {}, broken(), "cpu")]
    whole = dict(
        whole_tensors(observer.shapes, {"tied": next(iter(observer.shapes))}, observer.observed_now(source), "cpu")
    )
    for name, tensor in DriftingModel(weights_of(base)).at(1).items():
        assert torch.equal(whole[name], tensor.to(torch.bfloat16))
    assert whole["tied"] is whole[next(iter(observer.shapes))]


def test_whole_tensors_on_two_ranks(base: Path, tmp_path: Path) -> None:
    on_two_ranks("fail_while_weights_are_put_together", base, tmp_path)


def test_another_runs_folder_is_refused(base: Path, tmp_path: Path) -> None:
    train(tmp_path, base, "bf16", steps=[1, 2])
    for run, encoding in (({**RUN, "experiment": "other"}, "bf16"), (RUN, "fp32-int8")):
        observer = Observer(tmp_path / "trajectory", str(base), {}, run, encoding)
        observer.start(RankSource(DriftingModel(weights_of(base)).at(0)))
        with pytest.raises(TrajectoryError, match=r"another run \((experiment|encoding)"):
            observer.open(2)
    assert Trajectory(tmp_path / "trajectory").steps == [1, 2]


def test_engine_tensors_unknown_to_the_base_are_refused(base: Path, tmp_path: Path) -> None:
    weights = weights_of(base)
    observer = Observer(tmp_path, str(base), {}, RUN)
    with pytest.raises(ValueError, match="not in the base checkpoint"):
        observer.start(RankSource({**weights, "extra.weight": torch.zeros(3)}))
    name = next(iter(weights))
    with pytest.raises(ValueError, match="has shape"):
        observer.start(RankSource({**weights, name: torch.zeros(3, 3)}))


def fail_on_one_rank(rank: int, world: int, base: Path, out: Path) -> None:
    """Rank 1 meets NaN: both ranks get an error, none waits, nothing of the step is kept."""
    model = DriftingModel(weights_of(base))
    observer = Observer(out / "trajectory", str(base), {}, RUN)
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
    on_two_ranks("fail_on_one_rank", base, tmp_path)
    assert Trajectory(tmp_path / "trajectory").steps == [1, 2]


def leave_a_gap(rank: int, world: int, base: Path, out: Path) -> None:
    """Both ranks hold the first half only: the rest would be missing from every prediction."""
    observer = Observer(out / "trajectory", str(base), {}, RUN)
    with pytest.raises(ValueError, match=r"gap|end at element"):
        observer.start(RankSource(weights_of(base), 0, world))


def test_a_gap_between_the_shards_is_refused(base: Path, tmp_path: Path) -> None:
    on_two_ranks("leave_a_gap", base, tmp_path)


def test_memory_of_the_observer(base: Path, tmp_path: Path) -> None:
    """State and increments only: nothing grows beside what the encoding says."""
    observer = train(tmp_path, base, "fp32-int8")
    elements = sum(held.state.numel() for held in observer.held.values())
    assert all(held.state.dtype == ENCODINGS["fp32-int8"].dtype for held in observer.held.values())
    codes = sum(packed.arrays["code"].nbytes for packed in observer.collector.packed)
    assert codes <= len(STEPS) * (elements + 64 * len(observer.held))
