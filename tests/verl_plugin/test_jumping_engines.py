"""Jumps on verl's real FSDP engines, without Ray: what the weights are set to, what is undone, what is made again."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fakes import tiny_base
from pipeline import on_two_ranks
from test_engines import QUICKSTART, STRATEGIES, copied, engine_of, full_parameters, optimize

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.prediction import predicted_tensors
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import RunFacts, Setup
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

PREDICTION = Prediction("relex", 12)
CUT, LATER = 4, 8
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}}
# Name -> strategy, and what is trained besides whole weights.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{strategy: (strategy, {}) for strategy in STRATEGIES},
    **{f"{strategy}-lora": (strategy, LORA) for strategy in STRATEGIES},
}


def engine(root: Path, case: str) -> Any:
    """The same at every call: adapters are drawn."""
    strategy, model = CASES[case]
    torch.manual_seed(0)
    return engine_of(root / "base", strategy, "fp32", **model)


def rank_of(engine: Any, root: Path, out: Path) -> Any:
    """RELEX's part of a rank, ready to open its trajectory."""
    from relex_verl.run.rank import RelexRank
    from relex_verl.verl_plugin.adapters import AdapterEngine, peft_config
    from relex_verl.verl_plugin.source import VerlEngine

    config = RelexConfig.from_mapping({"on_cut": "jump", "t_cut": CUT, "observe_every": 1, "output_dir": str(out)})
    plans = {config.kind.name: config.plan(20)}
    ours = VerlEngine if peft_config(engine) is None else AdapterEngine
    rank = RelexRank(Setup(config, plans, 0, out, RunFacts(str(root / "base"), "p", "e")), ours(engine))
    rank.start()
    return rank


def train(engine: Any, rank: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        optimize(engine)
        rank.observe(step, now=False)


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    """All weights, trained or frozen, and the optimizer's state."""
    from relex_verl.verl_plugin.fsdp import kept_state

    return copied(kept_state(engine))


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """What is trained, whole, by its name in the trajectory."""
    from relex_verl.verl_plugin.adapters import adapter_name, peft_config

    full = full_parameters(engine)
    if peft_config(engine) is None:
        return full
    return {name: tensor for parameter, tensor in full.items() if (name := adapter_name(parameter)) is not None}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def jumped(root: Path, case: str) -> dict[str, Any]:
    """A jump, training from there, and its undoing; then the same start again, killed after the jump and resumed."""
    out = root / f"{case}-{dist.get_world_size()}"
    first = engine(root, case)
    rank = rank_of(first, root, out)
    rank.open(0)
    train(first, rank, 1, CUT)
    before = state_of(first)
    distance = rank.jumping.jump(CUT, PREDICTION, "keep", True)
    after, weights = state_of(first), weights_of(first)
    train(first, rank, CUT + 1, LATER)
    trained = state_of(first)
    seen = {
        "distance": distance,
        "weights": weights,
        "optimizer kept": same(*({n: t for n, t in one.items() if n.startswith("state")} for one in (before, after))),
    }
    rank.jumping.undo(LATER)
    seen["undone"] = same(state_of(first), before)
    seen["windows"] = [vars(window) for window in Trajectory(out / "trajectory").index.windows]

    # Resumed from the host's checkpoint of the cut, which was saved before the jump.
    again = engine(root, case)
    rank = rank_of(again, root, out)
    for _ in range(CUT):
        optimize(again)
    assert same(state_of(again), before)
    seen["began"] = rank.open(CUT).began
    seen["said"] = rank.jumping.replay()
    seen["made again"] = same(state_of(again), after)
    train(again, rank, CUT + 1, LATER)
    seen["trained again"] = same(state_of(again), trained)
    try:
        rank.jumping.jump(LATER, Prediction("nope", 16), "reset", False)
    except Exception as error:
        seen["refused"] = str(error)
    seen["left alone"] = same(state_of(again), trained)
    rank.jumping.jump(LATER, Prediction("relex", 16), "reset", False)
    seen["reset"] = not any(name.startswith("state") for name in state_of(again))
    return seen


def work(rank: int, world: int, root: Path) -> None:
    """Both engines on two ranks, then on one: rank 0 goes on in a group of its own."""
    sys.path.insert(0, str(QUICKSTART))
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu"}
    importlib.import_module("verl.workers.engine_workers")
    for case in CASES:
        torch.save(jumped(root, case), root / f"{case}-2-{rank}.pt")
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo", f"file://{root}/alone_{rank}", rank=0, world_size=1)
    if rank == 0:
        for case in STRATEGIES:
            torch.save(jumped(root, case), root / f"{case}-1-0.pt")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jumping")
    tiny_base(root / "base", tied=True)
    on_two_ranks(work, root)
    return root


def offline(out: Path) -> dict[str, torch.Tensor]:
    """The prediction from the trajectory's first window, float32, from disk alone."""
    window = Trajectory(out / "trajectory", 0)
    shards = predicted_tensors(
        replay.histories(window), window.kind, replay.window(window), PREDICTION, dtype=torch.float32
    )
    whole = {name: torch.full((torch.Size(shape).numel(),), torch.nan) for name, shape in window.index.tensors.items()}
    for shard in shards:
        for local, full, length in shard.placement.runs():
            whole[shard.name][full : full + length] = shard.data[local : local + length]
    return whole


@pytest.mark.parametrize(
    ("case", "world"), [*((case, 2) for case in CASES), *((strategy, 1) for strategy in STRATEGIES)]
)
def test_a_jump_is_the_offline_prediction_and_can_be_undone_and_made_again(
    engines: Path, case: str, world: int
) -> None:
    ranks = [torch.load(engines / f"{case}-{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    expected = offline(engines / f"{case}-{world}")
    for seen in ranks:
        assert seen["weights"].keys() == expected.keys()
        for name, tensor in seen["weights"].items():
            assert torch.equal(tensor.flatten(), expected[name]), name
        assert seen["distance"] > 0
        assert seen["optimizer kept"]
        assert seen["undone"]
        origins = [(window["origin_step"], window["undone"]) for window in seen["windows"]]
        assert origins == [(0, False), (CUT, False), (LATER, True)]
        assert seen["windows"][1]["jump"]["target"] == PREDICTION.target
        assert seen["began"]
        assert seen["said"] == f"the jump of step {CUT} is made again"
        assert seen["made again"]
        assert seen["trained again"]
        assert "nope" in seen["refused"]
        assert seen["left alone"]
        assert seen["reset"]
