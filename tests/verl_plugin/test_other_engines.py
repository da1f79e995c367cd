"""verl's real engines of VeOmni, Megatron and TorchTitan on two gloo ranks: that their shards become the checkpoint.

Skipped by name where a package is not installed; .github/CONTRIBUTING.md says how they are. Models, parallel groups,
loading and converters are verl's and the packages' own; what stands in for CUDA is in tests/without_cuda.py.
"""

import importlib
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import on_two_ranks
from test_engines import QUICKSTART, assembled, kept

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint

# What an engine needs that verl does not install.
PACKAGES = {
    "veomni": ("veomni",),
    "megatron": ("megatron.core", "megatron.bridge", "einops", "triton"),
    # The release 0.2.2 lacks the second, 0.3.0 the first.
    "torchtitan": ("torchtitan.components.lr_scheduler", "torchtitan.observability", "spmd_types", "tyro", "triton"),
}
# engine -> (model, its settings)
CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "veomni": [
        ("qwen2", {}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"expert_parallel_size": 2}),
        ("deepseek_v3", {"expert_parallel_size": 2}),
    ],
    "megatron": [
        ("qwen2", {"tensor_model_parallel_size": 2}),
        ("qwen2", {"pipeline_model_parallel_size": 2}),
        ("qwen3", {"tensor_model_parallel_size": 2}),
        ("qwen3", {}),
        ("qwen3_moe", {"tensor_model_parallel_size": 2}),
        ("qwen3_moe", {"pipeline_model_parallel_size": 2}),
    ],
    "torchtitan": [
        ("titan", {"data_parallel_shard_size": 2}),
        ("titan", {"tensor_parallel_size": 2}),
        ("titan_moe", {"data_parallel_shard_size": 2}),
        ("titan_moe", {"data_parallel_shard_size": 2, "expert_parallel_size": 2}),
    ],
}
SMALL = {
    "vocab_size": 62, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
# TorchTitan builds the models of its own tables only; the test's are their debug models, with fewer layers.
TITAN = {
    **SMALL, "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 3072, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SMALL),
    "qwen3_moe": ("Qwen3Moe", {**SMALL, **EXPERTS}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        },
    ),
    "titan": ("Qwen3", {**TITAN, "tie_word_embeddings": True}),
    "titan_moe": (
        "Qwen3Moe",
        {**TITAN, "num_hidden_layers": 1, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8},
    ),
}  # fmt: skip
GROWTH = 1 + 2**-5  # by which a step of the test multiplies every weight: each changes, replicas alike


def tiny_model(folder: Path, model: str) -> None:
    """A checkpoint of transformers with random weights, norms included."""
    import transformers

    name, settings = MODELS[model]
    torch.manual_seed(0)
    module = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings))
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.1)
    module.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))  # TorchTitan opens it


def configs_of(engine: str, settings: dict[str, Any]) -> tuple[type, Any, Any]:
    """verl's engine class, its configuration and the optimizer's."""
    from verl.workers import config

    if engine == "veomni":
        from verl.workers.engine.veomni import VeOmniEngineWithLMHead

        eager = {"attn_implementation": "sdpa", "moe_implementation": "eager", "use_torch_compile": False}
        engine_config = config.VeOmniEngineConfig(mixed_precision=True, **eager, **settings)
        return VeOmniEngineWithLMHead, engine_config, config.VeOmniOptimizerConfig(lr=1e-5, total_training_steps=10)
    if engine == "megatron":
        from megatron.bridge.models.gpt_provider import local_layer_spec
        from verl.workers.engine.megatron import MegatronEngineWithLMHead

        fused = (
            "apply_rope",
            "bias_activation",
            "bias_dropout",
            "gradient_accumulation",
            "masked_softmax",
            "moe_permute",
        )
        overrides = {
            "transformer_layer_spec": local_layer_spec, "attention_backend": "unfused", "moe_grouped_gemm": False,
            **{f"{name}_fusion": False for name in fused},
        }  # fmt: skip
        engine_config = config.McoreEngineConfig(
            forward_only=True, sequence_parallel=False, override_transformer_config=overrides, **settings
        )
        return MegatronEngineWithLMHead, engine_config, config.McoreOptimizerConfig(lr=1e-5)
    from torchtitan.models.qwen3 import qwen3_configs
    from verl.workers.engine.torchtitan import TorchTitanEngineWithLMHead

    def first_layers(flavor: str, count: int) -> Any:
        def configured(**named: Any) -> Any:
            model = original(**named)
            model.layers = model.layers[:count]
            return model

        original = qwen3_configs[flavor]
        return configured

    qwen3_configs.setdefault("tests", first_layers("debugmodel", 2))
    qwen3_configs.setdefault("tests_moe", first_layers("debugmodel_moe", 1))
    plain = {"spmd_backend": "default", "activation_checkpoint": "none", "use_torch_compile": False, "max_seq_len": 64}
    engine_config = config.TorchtitanEngineConfig(**plain, **settings)
    return TorchTitanEngineWithLMHead, engine_config, config.TorchtitanOptimizerConfig(lr=1e-5, total_training_steps=10)


def build_all(rank: int, world: int, root: Path, engine: str) -> None:
    """Every case of an engine, in a process that has not imported verl yet."""
    sys.path.insert(0, str(QUICKSTART))
    os.environ |= {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import without_cuda

    if engine == "megatron":
        without_cuda.import_megatron_bridge()
        without_cuda.stay_on_the_host()
    if engine == "torchtitan":
        without_cuda.be_the_accelerator()
    importlib.import_module("verl.workers.engine_workers")
    for i, (model, settings) in enumerate(CASES[engine]):
        _build(root / f"{engine}-{i}-{rank}.pt", root / model, engine, settings)
        if engine == "megatron":
            importlib.import_module("megatron.core.parallel_state").destroy_model_parallel()


def _build(out: Path, model: Path, engine: str, settings: dict[str, Any]) -> None:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import HFModelConfig

    from relex_verl.verl_plugin.source import VerlEngine

    made, engine_config, optimizer_config = configs_of(engine, settings)
    model_config = HFModelConfig(
        path=str(model), load_tokenizer=False, use_remove_padding=False, enable_gradient_checkpointing=False
    )
    built = made(model_config, engine_config, optimizer_config, CheckpointConfig())
    built.initialize()
    ours = VerlEngine(built)
    source = ours.shards(master=False)
    seen = {"loaded": kept(source)}
    modules = built.module if isinstance(built.module, list) else [built.module]
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        data = parameter.data
        (data.to_local() if hasattr(data, "to_local") else data).mul_(GROWTH)
    seen["moved"] = kept(source)
    torch.save({"shards": seen, "no_master": ours.no_master, "aliases": ours.aliases}, out)


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An engine, and the folder where each rank of each of its cases left what it saw."""
    engine = request.param
    for package in PACKAGES[engine]:
        if not _installed(package):
            pytest.skip(f"{package} is not installed, which verl's {engine} engine needs (.github/CONTRIBUTING.md)")
    root = tmp_path_factory.mktemp(engine)
    for model in dict.fromkeys(model for model, _ in CASES[engine]):
        tiny_model(root / model, model)
    on_two_ranks(build_all, root, engine)
    return engine, root


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # nor is the package around it
        return False


def test_shards_of_each_engine_become_the_checkpoint(built: tuple[str, Path]) -> None:
    """Every element once, bit by bit, under the checkpoint's names: as it was loaded, and after all weights have moved."""
    engine, root = built
    for i, (model, settings) in enumerate(CASES[engine]):
        ranks = [torch.load(root / f"{engine}-{i}-{rank}.pt", weights_only=False) for rank in range(2)]
        checkpoint = BaseCheckpoint(root / model)
        stored = {name: checkpoint.read(name) for name in checkpoint.entries}
        for when, weights in (("loaded", stored), ("moved", {name: one * GROWTH for name, one in stored.items()})):
            whole = assembled([rank["shards"][when] for rank in ranks])
            assert whole.keys() == weights.keys(), (model, settings)
            for name, tensor in weights.items():
                assert torch.equal(whole[name], tensor), (model, settings, when, name)
        tied = MODELS[model][1]["tie_word_embeddings"]
        assert ranks[0]["aliases"] == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
        assert ranks[0]["no_master"].endswith("hands out bfloat16 weights only")
