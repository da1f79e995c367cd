"""verl's real FSDP engines, without Ray: which elements `EngineSource` hands out, and that they are the model's.

The engines are those of the quickstart (recipes/quickstart/verl_cpu): verl's, wrapped for the CPU. One spawn of two
processes builds them all, since importing verl takes longer than everything else here.
"""

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fakes import tiny_base
from pipeline import on_two_ranks

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import ShardSource, TensorShard, check_cover, share_out

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
MODELS = ("tied", "untied")
STRATEGIES = ("fsdp", "fsdp2")
# model_dtype of verl -> the one of the parameters.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def engine_of(
    model: Path,
    strategy: str,
    dtype: str,
    attention: str = "sdpa",
    param_offload: bool = False,
    computes_in: str = "bf16",
    fsdp_size: int = -1,
    **lora: Any,
) -> Any:
    """verl's engine with its model, as a worker of the trainer makes it; `lora` are keys of its model."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    engine = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(
            path=str(model),
            load_tokenizer=False,
            use_remove_padding=False,
            enable_gradient_checkpointing=False,
            override_config={"attn_implementation": attention},
            **lora,
        ),
        engine_config=FSDPEngineConfig(
            strategy=strategy,
            model_dtype=dtype,
            use_torch_compile=False,
            param_offload=param_offload,
            mixed_precision={"param_dtype": computes_in},
            fsdp_size=fsdp_size,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-5, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def move(engine: Any) -> None:
    """Every weight by an amount of its own, as a step of training does."""
    for i, parameter in enumerate(engine.module.parameters()):
        local = parameter.data.to_local() if hasattr(parameter.data, "to_local") else parameter.data
        generator = torch.Generator().manual_seed(1000 * i + dist.get_rank())
        local += (1e-2 * torch.randn(local.shape, generator=generator)).to(local.dtype)


def full_parameters(engine: Any) -> dict[str, torch.Tensor]:
    """All weights, gathered by torch and by nobody else."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(engine.module, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(engine.module, writeback=False):
            named = [(name, tensor.detach().clone()) for name, tensor in engine.module.named_parameters()]
        return {name.replace("_fsdp_wrapped_module.", ""): tensor for name, tensor in named}
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()
        for name, tensor in engine.module.named_parameters()
    }


def seen_of(engine: Any, dtype: str) -> dict[str, Any]:
    """What one rank sees of its engine through `VerlEngine`: as it was loaded, and after its weights have moved."""
    from relex_verl.verl_plugin.source import VerlEngine

    ours = VerlEngine(engine)
    sources = {"bf16": ours.shards(master=False)} | ({"fp32": ours.shards(master=True)} if dtype == "fp32" else {})
    shards = {(kind, "loaded"): kept(source) for kind, source in sources.items()}
    move(engine)
    shards |= {(kind, "moved"): kept(source) for kind, source in sources.items()}
    full = full_parameters(engine)
    return {
        "full": full,
        "shards": shards,
        "set": None if dtype == "bf16" else set_and_undone(engine, sources["fp32"]),
        "aliases": ours.aliases,
        "no_master": ours.no_master,
        "optimizer_on_host": ours.optimizer_on_host,
    }


def set_and_undone(engine: Any, source: Any) -> dict[str, Any]:
    """A step of the optimizer, then other weights and a step from them, then back; then without the optimizer's state."""
    from relex_verl.verl_plugin.fsdp import kept_state, reset_optimizer, restore_state

    optimize(engine)
    before, full = copied(kept_state(engine)), full_parameters(engine)
    source.assign([replace(shard, data=2 * shard.data + 1) for shard in reversed(kept(source))])
    set_to = full_parameters(engine)
    optimize(engine)
    elsewhere = copied(kept_state(engine))
    restore_state(engine, before)
    back = copied(kept_state(engine))
    unchanged = {name: torch.equal(tensor, before[name]) for name, tensor in back.items()}
    reset_optimizer(engine)
    return {
        "full": full,
        "set": set_to,
        "moved": {name: not torch.equal(tensor, before[name]) for name, tensor in elsewhere.items() if tensor.numel()},
        "unchanged": unchanged,
        "reset": list(kept_state(engine)),
    }


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def optimize(engine: Any) -> None:
    """A step of the engine's own optimizer, with gradients of no meaning."""
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def kept(source: ShardSource) -> list[TensorShard]:
    """All shards, in memory of their own: an engine's may be views of its weights."""
    return [TensorShard(shard.name, shard.shape, shard.placement, shard.data.clone()) for shard in source]


def build_all(rank: int, world: int, root: Path) -> None:
    """Every engine on two ranks, then on one: rank 0 goes on in a group of its own."""
    # This process has not imported verl yet, which asks for its platform while it is imported.
    sys.path.insert(0, str(QUICKSTART))
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu"}
    importlib.import_module("verl.workers.engine_workers")  # the trainer's workers; verl_cpu adds its engines to them
    cases = [(model, strategy, dtype) for model in MODELS for strategy in STRATEGIES for dtype in DTYPES]
    for model, strategy, dtype in cases:
        _build(root, model, strategy, dtype)
    dist.destroy_process_group()
    dist.init_process_group("cpu:gloo", f"file://{root}/alone_{rank}", rank=0, world_size=1)
    if rank == 0:
        for model, strategy, dtype in cases:
            _build(root, model, strategy, dtype)


def _build(root: Path, model: str, strategy: str, dtype: str) -> None:
    seen = seen_of(engine_of(root / model, strategy, dtype), dtype)
    torch.save(seen, root / f"{model}-{strategy}-{dtype}-{dist.get_world_size()}-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where each rank of each engine left what it saw."""
    root = tmp_path_factory.mktemp("engines")
    for model in MODELS:
        tiny_base(root / model, tied=model == "tied", dtype=torch.float32)  # which bfloat16 could not hold
    on_two_ranks(build_all, root)
    return root


Case = tuple[str, str, str, int]


@pytest.fixture(
    params=[(m, s, d, world) for m in MODELS for s in STRATEGIES for d in DTYPES for world in (1, 2)],
    ids=lambda case: "-".join(map(str, case)),
)
def seen(request: pytest.FixtureRequest, engines: Path) -> tuple[Case, list[dict[str, Any]]]:
    """A case, and what each of its ranks saw."""
    *_, world = case = request.param
    name = "-".join(map(str, case))
    return case, [torch.load(engines / f"{name}-{rank}.pt", weights_only=False) for rank in range(world)]


def assembled(ranks: list[list[TensorShard]]) -> dict[str, torch.Tensor]:
    """Whole tensors of all ranks' shards, after checking that every element is handed out exactly once."""
    counted = share_out([[(shard.name, shard.shape, shard.placement) for shard in shards] for shards in ranks])
    shapes = check_cover(counted)
    dtype = ranks[0][0].data.dtype
    whole = {name: torch.full((torch.Size(shape).numel(),), torch.nan, dtype=dtype) for name, shape in shapes.items()}
    for rank, shards in enumerate(ranks):
        for shard in shards:
            assert shard.data.dtype == dtype
            for local, full, length in shard.placement.runs() if shard.name in counted[rank] else ():
                assert whole[shard.name][full : full + length].isnan().all(), "handed out twice"
                whole[shard.name][full : full + length] = shard.data[local : local + length]
    return {name: tensor.view(shapes[name]) for name, tensor in whole.items()}


def test_every_element_is_handed_out_once_and_is_the_models(
    seen: tuple[Case, list[dict[str, Any]]], engines: Path
) -> None:
    """The float32 master weights bit by bit, the bfloat16 ones rounded; FSDP1's and FSDP2's, of one rank and of two."""
    (model, _, dtype, world), ranks = seen
    checkpoint = BaseCheckpoint(engines / model)
    stored = {name: checkpoint.read(name).to(DTYPES[dtype]) for name in checkpoint.entries}
    assert ("lm_head.weight" in stored) == (model == "untied")
    weights = {"loaded": stored, "moved": ranks[0]["full"]}
    assert all(not torch.equal(weights["moved"][name], tensor) for name, tensor in stored.items())
    kinds = ("bf16", "fp32") if dtype == "fp32" else ("bf16",)
    assert ranks[0]["shards"].keys() == {(kind, when) for kind in kinds for when in weights}
    for (kind, when), _ in ranks[0]["shards"].items():
        whole = assembled([rank["shards"][kind, when] for rank in ranks])
        assert whole.keys() == weights[when].keys()
        for name, tensor in weights[when].items():
            assert whole[name].dtype == DTYPES[kind]
            assert torch.equal(whole[name], tensor.to(DTYPES[kind])), (kind, when, name)
    elements = sum(tensor.numel() for tensor in stored.values())
    for rank in ranks:  # no rank holds much more than its share
        assert sum(shard.data.numel() for shard in rank["shards"]["bf16", "loaded"]) <= 1.1 * elements / world


def test_weights_are_set_and_set_back_with_the_optimizers_state(seen: tuple[Case, list[dict[str, Any]]]) -> None:
    """Each rank sets its own, in place; what is undone is bit for bit what was before."""
    (_, _, dtype, _), ranks = seen
    if dtype == "bf16":
        return
    for rank in ranks:
        found = rank["set"]
        for name, tensor in found["full"].items():
            assert torch.equal(found["set"][name], 2 * tensor + 1), name
        assert any(name.startswith("state.") for name in found["moved"])
        assert all(found["moved"].values())
        assert found["unchanged"].keys() >= found["moved"].keys()
        assert all(found["unchanged"].values())
        assert found["reset"]
        assert all(name.startswith("weight.") for name in found["reset"])


def test_float32_weights_are_told_from_rounded_ones(seen: tuple[Case, list[dict[str, Any]]]) -> None:
    (model, _, dtype, _), ranks = seen
    reason = "the engine's parameters are torch.bfloat16, not float32 (fsdp_config.model_dtype)"
    for rank in ranks:
        assert rank["no_master"] == (None if dtype == "fp32" else reason)
        assert rank["aliases"] == ({"lm_head.weight": "model.embed_tokens.weight"} if model == "tied" else {})
        assert rank["optimizer_on_host"] is False
