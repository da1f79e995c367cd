"""verl's own shard converters of Megatron and VeOmni, without a GPU, and what becomes of their shards.

The converters are verl's (`mcore_hf_delta_entry`, `hf_entry_converter`); stand-ins are the engine around them and the bridge
that Megatron would bring: one rank's view of fused, row-parallel and padded weights, written from their definitions.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import verl
from architectures import base_of, has_images
from verl.workers.engine.spec import BlockPlacement, ShardSpec

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import check_cover, share_out
from relex_verl.verl_plugin.fsdp import has_float32_master
from relex_verl.verl_plugin.source import EngineSource, VerlEngine

ENGINES = Path(verl.__file__).parent / "workers" / "engine"
RANKS, HIDDEN, FFN, VOCABULARY = 2, 6, 10, 13


def load(backend: str, file: str) -> ModuleType:
    """A module of an engine whose package cannot be imported here (it wants Megatron, or VeOmni)."""
    name = f"{backend}_{file}_alone"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ENGINES / backend / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def hugging_face() -> dict[str, torch.Tensor]:
    """The model as its checkpoint has it."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.layers.0.mlp.gate_proj.weight": (FFN, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (FFN, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, FFN),
        "model.norm.weight": (HIDDEN,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.bfloat16)


class Engine:
    """One rank of an engine: its exporter, and the converter that it was given."""

    model_config = SimpleNamespace(hf_config=SimpleNamespace(tie_word_embeddings=False))
    module = torch.nn.Linear(1, 1)

    def __init__(self, exported: list[tuple[str, torch.Tensor, ShardSpec]], entry: Callable[..., Any]) -> None:
        self.exported, self._hf_delta_entry = exported, entry

    def get_per_tensor_param_shard(self) -> tuple[Iterator[tuple[str, torch.Tensor, ShardSpec]], None]:
        return iter(self.exported), None


def megatron(rank: int, weights: dict[str, torch.Tensor]) -> Engine:
    """Tensor parallel: gate and up fused, down cut by columns, the vocabulary padded to a multiple of the ranks."""
    half, columns = FFN // RANKS, FFN // RANKS
    rows = slice(rank * half, (rank + 1) * half)
    gate, up = weights["model.layers.0.mlp.gate_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"]
    padded = torch.cat([weights["model.embed_tokens.weight"], torch.zeros(1, HIDDEN, dtype=torch.bfloat16)])
    local = {
        "decoder.linear_fc1": torch.cat([gate[rows], up[rows]]),
        "decoder.linear_fc2": weights["model.layers.0.mlp.down_proj.weight"][:, rank * columns : (rank + 1) * columns],
        "embedding": padded.chunk(RANKS)[rank],
        "final_norm": weights["model.norm.weight"],
    }

    def gathered(shard: torch.Tensor, dim: int) -> torch.Tensor:
        """What an all-gather gives, the other ranks' parts unknown."""
        return torch.cat([shard if one == rank else torch.full_like(shard, torch.nan) for one in range(RANKS)], dim)

    def fc1(shard: torch.Tensor, _module: Any) -> dict[str, torch.Tensor]:
        mine = shard.chunk(2)
        names = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
        return {name: gathered(part, 0) for name, part in zip(names, mine, strict=True)}

    converters = {
        "decoder.linear_fc1": fc1,
        "decoder.linear_fc2": lambda shard, _: {"model.layers.0.mlp.down_proj.weight": gathered(shard, 1)},
        "embedding": lambda shard, _: {"model.embed_tokens.weight": gathered(shard, 0)[:VOCABULARY]},
        "final_norm": lambda shard, _: {"model.norm.weight": shard},
    }
    export = load("megatron", "delta_export")
    records = {
        name: export.McoreParamExport(
            name,
            tensor,
            ShardSpec(tuple(tensor.shape), place=0),
            SimpleNamespace(megatron_to_hf=converters[name]),
            None,
        )
        for name, tensor in local.items()
    }
    cache: dict[str, Any] = {}
    return Engine(
        [(name, tensor.contiguous().view(-1), records[name].spec) for name, tensor in local.items()],
        lambda name, spec, place, index, value: export.mcore_hf_delta_entry(records[name], place, index, value, cache),
    )


def test_megatrons_shards_become_the_checkpoint() -> None:
    weights = hugging_face()
    sources = [EngineSource(megatron(rank, weights)) for rank in range(RANKS)]
    found = [[(shard.name, shard.shape, shard.placement) for shard in source] for source in sources]
    counted = share_out(found)
    assert check_cover(counted) == {name: tuple(tensor.shape) for name, tensor in sorted(weights.items())}
    whole = {name: nan(tensor.numel()) for name, tensor in weights.items()}
    for rank, source in enumerate(sources):
        for shard in source:
            if shard.name in counted[rank]:
                for local, full, length in shard.placement.runs():
                    whole[shard.name][full : full + length] = shard.data[local : local + length]
    for name, tensor in weights.items():
        assert torch.equal(whole[name].view(tensor.shape), tensor), name


def test_what_lies_together_in_a_shard_is_handed_out_as_a_view_of_it() -> None:
    """Also halves of a fused weight: known by where a run begins, not by an index and a copy of each element."""
    engine = megatron(1, hugging_face())
    exported = {tensor.untyped_storage().data_ptr() for _, tensor, _ in engine.exported}
    shards = list(EngineSource(engine))
    assert len(shards) == 5
    assert all(shard.data.untyped_storage().data_ptr() in exported for shard in shards)
    assert max(len(list(shard.placement.runs())) for shard in shards) <= HIDDEN


def test_a_converter_that_computes_new_values_is_refused() -> None:
    engine = megatron(0, hugging_face())
    original = engine._hf_delta_entry

    def blended(name: str, spec: Any, place: Any, index: torch.Tensor, value: torch.Tensor) -> Any:
        return original(name, spec, place, index, value / 2 if index.numel() else value)

    engine._hf_delta_entry = blended
    with pytest.raises(ValueError, match="are not handed out as they are stored"):
        list(EngineSource(engine))


def test_veomnis_fused_experts_become_the_checkpoint() -> None:
    """Three experts' gate and up in one stack, cut between the ranks in the middle of an expert."""
    experts, shape = 3, (4, 5)
    generator = torch.Generator().manual_seed(1)
    stack = torch.randn(experts, 2, *shape, generator=generator).to(torch.bfloat16)

    def to_hf(start: int, segment: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [
            (f"model.layers.0.mlp.experts.{start + i}.{part}_proj.weight", row[j])
            for i, row in enumerate(segment)
            for j, part in enumerate(("gate", "up"))
        ]

    slots = [(name, tuple(tensor.shape)) for name, tensor in to_hf(0, stack)]
    converter = load("veomni", "utils").hf_entry_converter
    sources = []
    for rank in range(RANKS):
        block = BlockPlacement((experts, 1, *shape), (0, rank, 0, 0), tuple(stack.shape))
        spec = ShardSpec(tuple(stack.shape), place=block, to_hf_chunk=to_hf, hf_slots=slots)
        sources.append(EngineSource(Engine([("experts", stack[:, rank].reshape(-1), spec)], converter)))
    found = [[(shard.name, shard.shape, shard.placement) for shard in source] for source in sources]
    assert check_cover(share_out(found)) == dict(sorted(slots))
    expected = dict(to_hf(0, stack))
    for source in sources:
        for shard in source:
            flat = expected[shard.name].flatten()
            for local, full, length in shard.placement.runs():
                assert torch.equal(shard.data[local : local + length], flat[full : full + length])


def test_only_an_engine_whose_float32_weights_can_be_read_has_a_float32_trajectory() -> None:
    reason = has_float32_master(megatron(0, hugging_face()))
    assert reason == "Engine hands out bfloat16 weights only"


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_fused", "qwen3_vl_moe"])
def test_veomnis_stacks_are_cut_up_only_where_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    """Its engine around real models: each of two ranks of expert parallelism holds some experts of every stack whole.

    What is written is laid out like the base; what is sent has the names and cuts of VeOmni's handlers in verl.
    """
    base = BaseCheckpoint(base_of(name, tmp_path))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    auto = transformers.AutoModelForImageTextToText if has_images(config) else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    utils, handler = load("veomni", "utils"), default_handler()
    stacks = {key: one.detach() for key, one in model.named_parameters() if ".experts." in key and one.ndim == 3}
    slots = {key: utils.enumerate_hf_slots(handler, key, tuple(one.shape), one.dtype) for key, one in stacks.items()}
    whole = {entry: nan(*base.entries[entry].shape).flatten() for entry in base.entries if ".experts." in entry}
    engines = []
    for experts in (slice(0, 3), slice(3, 5)):
        exported = []
        for key, one in stacks.items():
            local = one[experts]
            block = BlockPlacement(tuple(local.shape), (experts.start, 0, 0), tuple(one.shape))
            spec = ShardSpec(
                tuple(one.shape),
                place=block,
                to_hf_chunk=lambda start, rows, key=key: list(handler(key, rows, expert_id_base=start)),
                hf_slots=slots[key],
            )
            exported.append((key, local.flatten(), spec))
        engine = Engine(exported, utils.hf_entry_converter)
        engine.module = model
        engine.model_config = SimpleNamespace(hf_config=config, local_path=str(tmp_path))
        engines.append(VerlEngine(engine))
        for shard in engines[-1].shards(master=False):
            for local, full, length in shard.placement.runs():
                whole[shard.name][full : full + length] = shard.data[local : local + length]
    shaped = {entry: tensor.view(base.entries[entry].shape) for entry, tensor in whole.items()}
    for entry, tensor in shaped.items():
        assert torch.equal(tensor, base.read(entry)), entry
    sent = dict(engines[0].as_sent(shaped.items()))
    expected = {slot: part for key, one in stacks.items() for slot, part in handler(key, one, expert_id_base=0)}
    assert sent.keys() == expected.keys()
    assert all(torch.equal(sent[slot], part) for slot, part in expected.items())


def default_handler() -> Any:
    """verl's, without the move of each expert to the accelerator."""
    utils = load("veomni", "utils")
    utils.get_device_id = lambda: "cpu"
    return utils.default_moe_param_handler
