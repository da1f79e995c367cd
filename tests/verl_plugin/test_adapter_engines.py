"""LoRA through verl's real FSDP engines on gloo, without Ray: followed, written, sent to the rollout, and given back.

The engines and the spawn are those of `test_engines`; the worker is RELEX's own, around an engine instead of verl's
constructor, which wants Ray. The oracle gathers with torch and computes in float64.
"""

import importlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fakes import tiny_base
from peft import PeftModel
from pipeline import on_two_ranks
from safetensors.torch import load_file
from test_engines import QUICKSTART, engine_of, full_parameters
from transformers import AutoModelForCausalLM

from relex_verl.maths.extrapolators import Prediction
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import OBSERVED, RunFacts, Setup
from relex_verl.run.schedule import Schedule
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory
from relex_verl.verl_plugin.adapters import adapter_name

STRATEGIES = ("fsdp", "fsdp2")
RANK, ALPHA, STEPS = 4, 12, 6
PREDICTION = Prediction("relex", 30)


def worker_of(root: Path, strategy: str, out: Path, kind: str, **model: Any) -> Any:
    """RELEX's worker with an engine of its own, after theta_0."""
    from relex_verl.verl_plugin.worker import RelexActorWorker

    lora = {"lora_rank": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "lora": {"merge": True}, **model}
    engine = engine_of(root / "base", strategy, "fp32", param_offload=True, **lora)
    worker = RelexActorWorker.__new__(RelexActorWorker)
    worker.actor = SimpleNamespace(engine=engine)
    config = RelexConfig.from_mapping({"t_cut": STEPS, "targets": [30], "observe_every": 1, "trajectory": kind})
    setup = Setup(config, Schedule(config, 40).plans, 2, out, RunFacts(str(root / "base"), "p", "e"))
    asked(worker.relex_start(setup))
    return worker


def asked(answer: Any) -> Any:
    assert answer.error is None, answer.error
    return answer.value


def adapters_of(engine: Any) -> dict[str, torch.Tensor]:
    """All adapters by PEFT's names, gathered by torch."""
    named = ((adapter_name(name), tensor) for name, tensor in full_parameters(engine).items())
    return {name: tensor.clone() for name, tensor in named if name is not None}


def storage_of(engine: Any) -> list[torch.Tensor]:
    """What this rank has of every parameter, trained and frozen."""
    datas = (parameter.data for parameter in engine.module.parameters())
    return [(data.to_local() if hasattr(data, "to_local") else data).clone() for data in datas]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(one, other, strict=True))


def sent(engine: Any, merge: bool, take: int | None = None) -> tuple[dict[str, torch.Tensor], Any]:
    """What verl's weight update gets of its exporter."""
    engine.model_config.lora["merge"] = merge
    tensors, config = engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
    kept = {}
    for name, tensor in tensors:
        kept[name] = tensor.clone()
        if len(kept) == take:
            break
    return kept, config


def move_adapters(engine: Any, step: int) -> None:
    """Every element along a line of its own, with noise."""
    trained = [parameter.data for parameter in engine.module.parameters() if parameter.requires_grad]
    for i, data in enumerate(trained):
        local = data.to_local() if hasattr(data, "to_local") else data
        seeds = 1000 * i + dist.get_rank(), 100_000 * step + 1000 * i + dist.get_rank()
        slope, noise = (torch.randn(local.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
        local += 1e-3 * (slope + 0.3 * noise)


def follow(worker: Any, steps: range) -> list[dict[str, torch.Tensor]]:
    states = []
    for step in steps:
        move_adapters(worker.actor.engine, step)
        states.append(adapters_of(worker.actor.engine))
        asked(worker.relex_observe(step, False))
    return states


def seen_of(root: Path, strategy: str, kind: str) -> dict[str, Any]:
    """A run of one kind, its prediction written and sent, and the storage of the parameters before and after."""
    rank, world = dist.get_rank(), dist.get_world_size()
    out = root / f"{strategy}-{kind}-{world}"
    worker = worker_of(root, strategy, out, kind)
    engine = worker.actor.engine
    states = [adapters_of(engine)]
    asked(worker.relex_open(0))
    states += follow(worker, range(1, STEPS + 1))
    asked(worker.relex_fit(["relex"], [30]))
    asked(worker.relex_write(PREDICTION, out / "predicted", {"method": "relex"}))
    before, base = storage_of(engine), full_parameters(engine)
    seen: dict[str, Any] = {"states": states, "base": base, "own": sent(engine, merge=True)[0]}
    for weights, key in ((PREDICTION, "predicted"), (OBSERVED, "observed")):
        for merge in (False, True):
            asked(worker.relex_substitute(weights))
            seen[key, merge], seen["config", merge] = sent(engine, merge)
            asked(worker.relex_substitute(None))
            seen[key, merge, "same"] = same(before, storage_of(engine))
    asked(worker.relex_substitute(PREDICTION))
    sent(engine, merge=True, take=3)  # the rollout dies
    asked(worker.relex_substitute(None))
    seen["broken off"] = same(before, storage_of(engine))
    seen["own again"] = sent(engine, merge=True)[0]
    return seen if rank == 0 else {key: value for key, value in seen.items() if "same" in key or key == "broken off"}


def resume(root: Path, strategy: str, kind: str) -> None:
    """The run is started again, and draws other adapters before verl loads the checkpoint of a step."""
    rank, out = dist.get_rank(), root / f"resumed-{strategy}-{kind}"
    if rank == 0:
        shutil.copytree(root / f"{strategy}-{kind}-2" / "trajectory", out / "trajectory")
    dist.barrier()
    torch.manual_seed(77)
    worker = worker_of(root, strategy, out, kind)
    seen = {"drawn": adapters_of(worker.actor.engine), "steps": list(asked(worker.relex_open(STEPS)).steps)}
    for step in range(1, STEPS + 2):
        move_adapters(worker.actor.engine, step)
    seen["last"] = adapters_of(worker.actor.engine)
    asked(worker.relex_observe(STEPS + 1, False))
    asked(worker.relex_write(PREDICTION, out / "predicted", {"method": "relex"}))
    asked(worker.relex_start(replace(worker._relex._setup, output_dir=root / "none")))
    seen["refused"] = worker.relex_open(4).error
    torch.save(seen, out / f"{rank}.pt")


def build_all(rank: int, world: int, root: Path) -> None:
    """Everything on two ranks, then on one: rank 0 goes on in a group of its own."""
    sys.path.insert(0, str(QUICKSTART))
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu"}
    importlib.import_module("verl.workers.engine_workers")
    cases = [(strategy, kind) for strategy in STRATEGIES for kind in ("fp32", "bf16", "sketch")]
    for strategy, kind in cases:
        torch.save(seen_of(root, strategy, kind), root / f"{strategy}-{kind}-2-{rank}.pt")
    for kind in ("fp32", "sketch"):
        resume(root, "fsdp2", kind)
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo", f"file://{root}/alone_{rank}", rank=0, world_size=1)
    if rank == 0:
        for strategy in STRATEGIES:
            torch.save(seen_of(root, strategy, "fp32"), root / f"{strategy}-fp32-1-0.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where each rank of each engine left what it saw."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_base(root / "base", dtype=torch.float32)
    on_two_ranks(build_all, root)
    return root


CASES = [(strategy, kind, 2) for strategy in STRATEGIES for kind in ("fp32", "bf16", "sketch")]
CASES += [(strategy, "fp32", 1) for strategy in STRATEGIES]
Case = tuple[str, str, int]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def seen(request: pytest.FixtureRequest, root: Path) -> tuple[Case, Path, list[dict[str, Any]]]:
    """A case, its output folder, and what each of its ranks saw."""
    strategy, kind, world = case = request.param
    ranks = [torch.load(root / f"{strategy}-{kind}-{world}-{rank}.pt", weights_only=False) for rank in range(world)]
    return case, root / f"{strategy}-{kind}-{world}", ranks


def checkout(out: Path, step: int) -> dict[str, torch.Tensor]:
    """An observed step from the trajectory, whole tensors in the kind's type."""
    trajectory = Trajectory(out / "trajectory")
    whole = {name: torch.zeros(shape, dtype=trajectory.kind.dtype) for name, shape in trajectory.index.tensors.items()}
    for shard in replay.states(trajectory, step):
        for local, full, length in shard.placement.runs():
            whole[shard.name].view(-1)[full : full + length] = shard.data[local : local + length]
    return whole


def dense_prediction(states: list[dict[str, torch.Tensor]], target: int) -> dict[str, torch.Tensor]:
    """Paper, Algorithm 2, over theta_0 and all steps, in float64."""
    weights = {}
    for name, origin in states[0].items():
        deltas = torch.stack([(state[name].double() - origin.double()).flatten() for state in states[1:]])
        left, sigma, right = torch.linalg.svd(deltas, full_matrices=False)
        times = torch.arange(1, len(states), dtype=torch.float64)
        design = torch.stack([times, torch.ones_like(times)], 1)
        slope, intercept = torch.linalg.lstsq(design, (left[:, 0] * sigma[0]).unsqueeze(1)).solution.flatten()
        weights[name] = origin.double() + ((slope * target + intercept) * right[0]).view_as(origin)
    return weights


def merged(base: dict[str, torch.Tensor], adapters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """base + alpha / r * B A, in float64."""
    weights = {name: tensor.double() for name, tensor in base.items()}
    for name, down in adapters.items():
        if ".lora_A." in name:
            up = adapters[name.replace("lora_A", "lora_B")]
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[layer] = weights[layer] + ALPHA / RANK * up.double() @ down.double()
    return weights


def test_theta_0_lies_in_the_trajectory_as_peft_has_it(seen: tuple[Case, Path, list[dict[str, Any]]]) -> None:
    (_, kind, _), out, (first, *_) = seen
    folder, origin = out / "trajectory" / "adapter", first["states"][0]
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == origin.keys()
    for name, tensor in origin.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], tensor if kind != "bf16" else tensor.bfloat16().float())
        assert stored[name].any() == ("lora_A" in name)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        RANK,
        ALPHA,
        str(out.parent / "base"),
    )
    assert json.loads((out / "trajectory" / "index.json").read_text())["schema_version"] == 3
    assert not (out / "trajectory" / ".empty").exists()


def test_observed_steps_come_back(seen: tuple[Case, Path, list[dict[str, Any]]]) -> None:
    (_, kind, _), out, (first, *_) = seen
    for step, state in enumerate(first["states"] if kind != "sketch" else first["states"][:1]):
        bound = replay.error_bound(Trajectory(out / "trajectory"), step)
        for name, tensor in checkout(out, step).items():
            exact = state[name] if kind != "bf16" else state[name].bfloat16()
            assert (tensor - exact).abs().max() <= bound
            assert tensor.abs().sum() > 0 or step == 0


def test_a_prediction_is_the_dense_one_and_an_adapter_like_theta_0(
    seen: tuple[Case, Path, list[dict[str, Any]]],
) -> None:
    (_, kind, _), out, (first, *_) = seen
    written, origin = out / "predicted", out / "trajectory" / "adapter"
    assert {path.name for path in written.iterdir()} == {path.name for path in origin.iterdir()}
    assert (written / "adapter_config.json").read_bytes() == (origin / "adapter_config.json").read_bytes()
    tensors, before = load_file(written / "adapter_model.safetensors"), load_file(origin / "adapter_model.safetensors")
    assert {name: (one.shape, one.dtype) for name, one in tensors.items()} == {
        name: (one.shape, one.dtype) for name, one in before.items()
    }
    states = first["states"] if kind == "sketch" else [checkout(out, step) for step in range(STEPS + 1)]
    dense = dense_prediction(states, PREDICTION.target)
    if kind == "sketch":  # a line through smoothed rows
        for name, tensor in dense.items():
            assert (tensors[name] - tensor).abs().max() <= 0.01 * (tensor - before[name]).abs().max()
        return
    # Rounded as every other checkpoint is, the same; in float32 up to a few last digits of what moved. The dense one is
    # rounded to float32 first, too: otherwise one of 65,536 is halfway between two bfloat16 numbers on one side only.
    wrong = sum(int((tensors[name].bfloat16() != tensor.float().bfloat16()).sum()) for name, tensor in dense.items())
    assert wrong <= 1e-5 * sum(tensor.numel() for tensor in dense.values())
    for name, tensor in dense.items():
        assert (tensors[name] - tensor).abs().max() <= 1e-6 * (tensor - before[name]).abs().max()


def test_peft_loads_a_prediction(seen: tuple[Case, Path, list[dict[str, Any]]]) -> None:
    _, out, _ = seen
    plain = AutoModelForCausalLM.from_pretrained(out.parent / "base", dtype=torch.float64)
    tokens = torch.arange(20).view(2, 10)
    before = plain(tokens).logits
    plain.load_state_dict(merged(plain.state_dict(), load_file(out / "predicted" / "adapter_model.safetensors")))
    wanted = plain(tokens).logits
    loaded = AutoModelForCausalLM.from_pretrained(out.parent / "base", dtype=torch.float32)
    peft = PeftModel.from_pretrained(loaded, out / "predicted")
    torch.testing.assert_close(peft(tokens).logits.double(), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-3


def test_the_rollout_gets_adapters_as_verl_sends_them(seen: tuple[Case, Path, list[dict[str, Any]]]) -> None:
    (_, kind, _), out, (first, *_) = seen
    written = load_file(out / "predicted" / "adapter_model.safetensors")
    last = {name: tensor if kind != "bf16" else tensor.bfloat16() for name, tensor in first["states"][-1].items()}
    for key, wanted in (("predicted", written), ("observed", last)):
        assert first[key, False].keys() == wanted.keys()
        for name, tensor in first[key, False].items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, wanted[name].float())
    config = first["config", False]
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)


def test_the_rollout_gets_merged_weights_by_verls_exporter(seen: tuple[Case, Path, list[dict[str, Any]]]) -> None:
    (_, kind, _), out, (first, *_) = seen
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in first["base"].items()
        if "lora_" not in name
    }
    written = load_file(out / "predicted" / "adapter_model.safetensors")
    own, last = first["own"], first["states"][-1]
    if kind == "bf16":
        last = {name: tensor.bfloat16() for name, tensor in last.items()}
    for key, adapters in (("predicted", written), ("observed", last)):
        tensors, wanted = first[key, True], merged(base, adapters)
        assert {name: (one.shape, one.dtype) for name, one in tensors.items()} == {
            name: (one.shape, one.dtype) for name, one in own.items()
        }
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=2**-8, atol=1e-6)
        moved = [name for name, tensor in tensors.items() if not torch.equal(tensor, own[name])]
        assert bool(moved) == (key == "predicted" or kind == "bf16")
    assert first["config", True] is None


def test_the_trained_weights_are_bit_for_bit_as_before(seen: tuple[Case, Path, list[dict[str, Any]]]) -> None:
    """After each scoring in both modes, and after one that the rollout broke off in the middle."""
    _, _, ranks = seen
    for rank in ranks:
        kept = {key: value for key, value in rank.items() if "same" in key or key == "broken off"}
        assert len(kept) == 5
        assert all(kept.values()), kept
    own, again = ranks[0]["own"], ranks[0]["own again"]
    assert all(torch.equal(own[name], tensor) for name, tensor in again.items())


@pytest.mark.parametrize("kind", ["fp32", "sketch"])
def test_a_resumed_run_counts_from_the_adapters_of_its_first_start(root: Path, kind: str) -> None:
    out, before = root / f"resumed-fsdp2-{kind}", torch.load(root / f"fsdp2-{kind}-2-0.pt", weights_only=False)
    for rank in range(2):
        seen = torch.load(out / f"{rank}.pt")
        assert seen["steps"] == list(range(1, STEPS + 1))
        assert "does not hold the adapters of this run before its first step" in seen["refused"]
    origin = load_file(out / "trajectory" / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(origin[name], tensor) for name, tensor in seen["drawn"].items())
    written = load_file(out / "predicted" / "adapter_model.safetensors")
    for name, tensor in dense_prediction([*before["states"], seen["last"]], PREDICTION.target).items():
        # The increment that leads to the other start's weights is larger than all others.
        torch.testing.assert_close(written[name].double(), tensor, rtol=0.1, atol=0.1 * float(tensor.abs().max()))


def test_only_linear_layers_have_adapters_that_are_followed() -> None:
    assert adapter_name("base_model.model.model.norm.weight") is None
    assert adapter_name("base_model.model.x.lora_A.default.weight") == "base_model.model.x.lora_A.weight"
    with pytest.raises(ValueError, match="linear layers only"):
        adapter_name("base_model.model.model.embed_tokens.lora_embedding_A.default")
