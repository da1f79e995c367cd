"""Many architectures through verl's real FSDP engines: what is written is laid out like the base, element for element.

The checkpoints are those of transformers; so are the oracles: what it would save of the engine's weights, and dense float64
matrices over the checkouts. One spawn of two processes builds all engines, since importing verl takes longest.
"""

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
import transformers
from architectures import ARCHITECTURES, base_of, has_images
from pipeline import PREDICTION, RUN, on_two_ranks
from safetensors.torch import load_file

from relex_verl.pipeline.gathering import whole_tensors
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import predicted_tensors, write_checkpoint, write_together
from relex_verl.trajectory import replay
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
STRATEGIES = ("fsdp", "fsdp2")
WORLDS = (1, 2)
KEPT = ("fp32-int8", "bf16")
STEPS = [1, 2, 3, 5]

pytestmark = pytest.mark.timeout(600)  # with the engines, of which there are sixty


def build_all(rank: int, world: int, root: Path) -> None:
    """Every engine on two ranks, then on one: each goes on in a group of its own, with the engines of one strategy."""
    sys.path.insert(0, str(QUICKSTART))
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu"}
    importlib.import_module("verl.workers.engine_workers")
    _build(root, world, STRATEGIES)
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo", f"file://{root}/alone_{rank}", rank=0, world_size=1)
    _build(root, 1, STRATEGIES[rank : rank + 1])


def _build(root: Path, world: int, strategies: tuple[str, ...]) -> None:
    from test_engines import engine_of

    for name in ARCHITECTURES:
        for strategy in strategies:
            engine = engine_of(root / "bases" / name, strategy, "fp32", "eager")
            train(engine, root / "bases" / name, root / f"{name}-{strategy}-{world}")


def train(engine: Any, base: Path, out: Path) -> None:
    """A few steps that are observed twice, as float32 and as bfloat16 weights; a prediction of each, and what is sent."""
    from test_engines import full_parameters, move

    from relex_verl.verl_plugin.source import VerlEngine

    ours = {kind: VerlEngine(engine) for kind in KEPT}
    sources = {kind: one.shards(master=KINDS[kind].wants_master) for kind, one in ours.items()}
    observers = {
        kind: Observer(out / kind / "trajectory", str(base), ours[kind].aliases, RUN, KINDS[kind]) for kind in KEPT
    }
    for kind, observer in observers.items():
        observer.start(sources[kind])
        observer.open(0)
    for step in STEPS:
        move(engine)
        for kind, observer in observers.items():
            observer.observe(step, sources[kind])
    full = full_parameters(engine)
    sent = {}
    for kind, observer in observers.items():
        shards = predicted_tensors(observer.histories(), observer.kind, observer.window(), PREDICTION)
        folder, followed = out / kind / "predicted", observer.kind.dtype
        write_together(observer.ranks, observer.base, observer.aliases, observer.shapes, shards, folder, {}, followed)
        now = observer.current(sources[kind])
        whole = whole_tensors(observer.ranks, observer.base, observer.shapes, observer.aliases, now, "cpu", followed)
        sent[kind] = {name: tensor.clone() for name, tensor in ours[kind].as_sent(whole)}
    exported, _ = engine.get_per_tensor_param()
    verls = {name: tensor.detach().clone() for name, tensor in exported}
    if dist.get_rank() == 0:
        torch.save({"full": full, "sent": sent, "verl": verls}, out / "seen.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all bases and runs."""
    root = tmp_path_factory.mktemp("architectures")
    for name in ARCHITECTURES:
        base_of(name, root / "bases" / name)
    on_two_ranks(build_all, root)
    return root


Case = tuple[str, Path, Path]


@pytest.fixture(
    params=[(name, strategy, world) for name in ARCHITECTURES for strategy in STRATEGIES for world in WORLDS],
    ids=lambda case: "-".join(map(str, case)),
)
def run(request: pytest.FixtureRequest, runs: Path) -> Case:
    """Name of the architecture, its base, and a run's folder."""
    name, strategy, world = request.param
    return name, runs / "bases" / name, runs / f"{name}-{strategy}-{world}"


def content(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def loaded(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """By transformers, with nothing missing and nothing left over."""
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForImageTextToText if has_images(config) else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    assert not any(report.values()), report
    return model


def test_what_is_predicted_is_laid_out_like_the_base_and_loads(run: Case) -> None:
    _, base, out = run
    for kind in KEPT:
        folder = out / kind / "predicted"
        assert BaseCheckpoint(folder).entries == BaseCheckpoint(base).entries
        assert {path.name for path in folder.iterdir()} == {path.name for path in base.iterdir()} | {"relex.json"}
        assert (folder / "config.json").read_text() == (base / "config.json").read_text()
        loaded(folder)


def test_a_checkout_is_what_transformers_saves_of_the_engines_weights(run: Case, tmp_path: Path) -> None:
    name, base, out = run
    model = loaded(base, torch.float32)
    weights = torch.load(out / "seen.pt")["full"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {*model.all_tied_weights_keys, *(key for key, _ in model.named_buffers())}
    model.save_pretrained(tmp_path / "saved")
    saved = content(tmp_path / "saved")
    for kind in KEPT:
        trajectory = Trajectory(out / kind / "trajectory")
        write_checkpoint(trajectory, replay.states(trajectory, STEPS[-1]), tmp_path / kind, dtype=torch.float32)
        error = replay.error_bound(trajectory, STEPS[-1])
        again = content(tmp_path / kind)
        assert again.keys() == saved.keys()
        for key, tensor in again.items():
            expected = saved[key]
            if tensor.shape != expected.shape:  # transformers takes no transposition back when it saves
                assert name == "qwen3_vl_moe"
                expected = expected.transpose(1, 2)
            if kind == "bf16":
                assert torch.equal(tensor.bfloat16(), expected.bfloat16()), key
            assert torch.allclose(tensor, expected, rtol=0 if error else 2**-8, atol=error), key


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predictions_are_the_dense_float64_ones_over_checkouts(
    runs: Path, tmp_path: Path, strategy: str, world: int, kind: str
) -> None:
    differing = total = moved = 0
    for name in ARCHITECTURES:
        out = runs / f"{name}-{strategy}-{world}" / kind
        trajectory, dtype = Trajectory(out / "trajectory"), KINDS[kind].dtype
        for step in STEPS:
            folder = tmp_path / name / str(step)
            write_checkpoint(trajectory, replay.states(trajectory, step), folder, dtype=torch.float32)
        states = {step: content(tmp_path / name / str(step)) for step in STEPS}
        stored, predicted = content(runs / "bases" / name), content(out / "predicted")
        for key, base in stored.items():
            start = base.to(dtype).double().flatten()
            deltas = torch.stack([states[step][key].to(dtype).double().flatten() - start for step in STEPS])
            expected = start + torch.from_numpy(oracle.relex(deltas.numpy(), STEPS, PREDICTION.target, 1))
            expected = torch.where((expected == start) & ~deltas.any(0), base.double().flatten(), expected)
            unequal = predicted[key].flatten() != expected.to(base.dtype)
            if base.dtype == torch.float32:  # the states that G is of are rounded to float32 themselves
                unequal &= (predicted[key].flatten().double() - expected).abs() > 2**-21 * expected.abs()
            differing += int(unequal.sum())
            moved += int((predicted[key] != base).sum())
            total += base.numel()
        shutil.rmtree(tmp_path / name)
    assert moved > 0.9 * total
    assert differing <= 1e-5 * total, f"{differing} of {total}"


def test_the_rollout_gets_what_verl_would_send(run: Case) -> None:
    """Names, shapes and values; in the base's types, where verl sends its float32 weights."""
    _, base, out = run
    seen = torch.load(out / "seen.pt")
    stored = BaseCheckpoint(base)
    types = {stored.dtype(name) for name in stored.entries}
    for kind, sent in seen["sent"].items():
        assert sent.keys() == seen["verl"].keys()
        for name, tensor in sent.items():
            expected = seen["verl"][name]
            assert tensor.shape == expected.shape, name
            assert tensor.dtype in types
            if kind == "bf16":
                expected = expected.bfloat16()
                tensor = tensor.bfloat16()
            assert torch.equal(tensor, expected.to(tensor.dtype)), (kind, name)
