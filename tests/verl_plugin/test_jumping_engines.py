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
from safetensors.torch import load_file
from test_engines import QUICKSTART, STRATEGIES, copied, engine_of, full_parameters, optimize

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.prediction import predicted_tensors
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import RunFacts, Setup
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

PREDICTION = Prediction("relex", 12)
TEMPERATURE = 0.7
CUT, LATER = 4, 8
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora": {"merge": True}}
# Name -> strategy, and what else: what is trained besides whole weights, how they are cut.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{strategy: (strategy, {}) for strategy in STRATEGIES},
    **{f"{strategy}-lora": (strategy, LORA) for strategy in STRATEGIES},
    "fsdp2-copies": ("fsdp2", {"fsdp_size": 1}),  # hybrid sharding: each of the two ranks has all weights
}


def engine(root: Path, case: str) -> Any:
    """The same at every call: adapters are drawn."""
    strategy, model = CASES[case]
    torch.manual_seed(0)
    return engine_of(root / "base", strategy, "fp32", computes_in="fp32", **model)


def minibatch() -> Any:
    """What verl hands to the engine of a rank: four questions of one token, answered in two to five, the last masked."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    drawn = torch.Generator().manual_seed(dist.get_rank())
    ids = [torch.randint(64, (length,), generator=drawn) for length in (3, 4, 6, 5)]
    masks = [torch.ones(len(one) - 1, dtype=torch.int64) for one in ids]
    masks[-1][1] = 0  # a token that a tool gave
    fields = {"input_ids": ids, "position_ids": [torch.arange(len(one)) for one in ids], "advantages": masks}
    fields |= {"response_mask": masks, "loss_mask": masks}
    nested = {name: torch.nested.as_nested_tensor(ones, layout=torch.jagged) for name, ones in fields.items()}
    batch = TensorDict(nested, batch_size=len(ids))
    tensordict_utils.assign_non_tensor(
        batch, temperature=TEMPERATURE, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=2
    )
    return batch


def learn(engine: Any, step: int) -> None:
    """A step of verl's own at the cut and after it, in which every rank makes its tokens more likely; others are quicker."""
    if step not in (CUT, CUT + 1):
        optimize(engine)
        return

    def loss(model_output: Any, data: Any, dp_group: Any) -> Any:
        return -model_output["log_probs"].values().mean(), {}

    with engine.train_mode():
        engine.train_batch(minibatch(), loss_function=loss)


def rank_of(engine: Any, root: Path, out: Path) -> Any:
    """RELEX's part of a rank, ready to open its trajectory."""
    from relex_verl.run.rank import RelexRank
    from relex_verl.verl_plugin.adapters import AdapterEngine, peft_config
    from relex_verl.verl_plugin.samples import LastSamples
    from relex_verl.verl_plugin.source import VerlEngine

    node = {"on_cut": "jump", "t_cut": CUT, "observe_every": 1, "output_dir": str(out), "jump_kl_max": 1.0}
    config = RelexConfig.from_mapping(node)
    plans = {config.kind.name: config.plan(20)}
    ours = VerlEngine if peft_config(engine) is None else AdapterEngine
    setup = Setup(config, plans, 0, out, RunFacts(str(root / "base"), "p", "e"))
    rank = RelexRank(setup, ours(engine), samples=LastSamples(engine))
    rank.start()
    return rank


def train(engine: Any, rank: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        learn(engine, step)
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


def is_in(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a checkpoint has these weights, rounded to its own types."""
    written: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        written |= load_file(file)
    return weights.keys() <= written.keys() and all(
        torch.equal(written[name].flatten(), tensor.flatten().to(written[name].dtype))
        for name, tensor in weights.items()
    )


def compared(engine: Any, rank: Any, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The policy before and after a jump that is not made; and by the samples that a run resumed here would find."""
    from relex_verl.verl_plugin.samples import LastSamples

    rank.fit(["relex"], [])  # where they are kept
    kl = rank.jumping.kl(CUT, PREDICTION)
    untouched = same(state_of(engine), before)
    rank.jumping._samples.release()
    watching, rank.jumping._samples = rank.jumping._samples, LastSamples(engine)
    resumed = rank.jumping.kl(CUT, PREDICTION)
    try:
        rank.jumping.kl(CUT + 1, PREDICTION)
    except Exception as error:
        refused = str(error)
    rank.jumping._samples.release()
    assert "train_batch" not in vars(engine)
    del watching
    seen = {"kl": kl, "kl when resumed": resumed, "no samples": refused, "untouched": untouched}
    return seen | {"still untouched": same(state_of(engine), before)}


def exact_kl(base: Path, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[float]:
    """Of each token that this rank's policy drew, by transformers' own model in float32, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model, batch, log_probs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), minibatch(), []
    for weights in (before, after):
        model.load_state_dict(weights, strict=False)
        for ids, mask in zip(batch["input_ids"], batch["response_mask"], strict=True):
            with torch.no_grad():
                logits = model(ids[None]).logits[0, :-1] / TEMPERATURE
            of_tokens = logits.double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            log_probs.append(of_tokens[-len(mask) :][mask.bool()])
    then, now = torch.cat(log_probs).chunk(2)
    return ((now - then).exp() - 1 - (now - then)).tolist()


def jumped(root: Path, case: str) -> dict[str, Any]:
    """A jump, training from there, and its undoing; then the same start again, killed after the jump and resumed."""
    out = root / f"{case}-{dist.get_world_size()}"
    first = engine(root, case)
    rank = rank_of(first, root, out)
    rank.open(0)
    train(first, rank, 1, CUT)
    before, weights_before = state_of(first), weights_of(first)
    measured = compared(first, rank, before)
    distance = rank.jumping.jump(CUT, PREDICTION, "keep", True)
    after, weights = state_of(first), weights_of(first)
    train(first, rank, CUT + 1, LATER)
    trained = state_of(first)
    rank.keep(out / f"best-step_{LATER}", {"step": LATER})
    seen = {
        "kept": is_in(out / f"best-step_{LATER}", weights_of(first)) and same(state_of(first), trained),
        **measured,
        "distance": distance,
        "weights": weights,
        "exact": [] if "lora" in case else exact_kl(root / "base", weights_before, weights),
        "optimizer kept": same(*({n: t for n, t in one.items() if n.startswith("state")} for one in (before, after))),
    }
    rank.jumping.undo(LATER)
    seen["undone"] = same(state_of(first), before)
    seen["windows"] = [vars(window) for window in Trajectory(out / "trajectory").index.windows]

    # Resumed from the host's checkpoint of the cut, which was saved before the jump.
    again = engine(root, case)
    rank = rank_of(again, root, out)
    for step in range(1, CUT + 1):
        learn(again, step)
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
        assert seen["kept"]
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


@pytest.mark.parametrize(
    ("case", "world"), [*((case, 2) for case in CASES), *((strategy, 1) for strategy in STRATEGIES)]
)
def test_the_policy_is_compared_before_and_after_and_no_weight_is_touched(engines: Path, case: str, world: int) -> None:
    ranks = [torch.load(engines / f"{case}-{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    for seen in ranks:
        assert seen["kl"] == seen["kl when resumed"] == ranks[0]["kl"] > 0
        assert f"has the samples of step {CUT}, not of {CUT + 1}" in seen["no samples"]
        assert seen["untouched"]
        assert seen["still untouched"]
    exact = [one for seen in ranks for one in seen["exact"]]
    if "lora" not in case:
        assert ranks[0]["kl"] == pytest.approx(sum(exact) / len(exact), rel=1e-3)
