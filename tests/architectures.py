"""Tiny random models of many architectures, as their checkpoints lie on the Hub: made and saved by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
# Five experts: two ranks hold three and two of them.
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 6, "num_experts": 5, "num_experts_per_tok": 2}
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 6, "n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
SEEN: dict[str, Any] = {"depth": 1, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 1}
SEEN_2: dict[str, Any] = {**SEEN, "embed_dim": 16, "hidden_size": 16}
SEEN_3: dict[str, Any] = {
    **SEEN, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 16, "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
}  # fmt: skip


def _vision(name: str, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> transformers.PretrainedConfig:
    config: type[transformers.PretrainedConfig] = getattr(transformers, f"{name}Config")
    return config(text_config={**TEXT, **text}, vision_config=vision, tie_word_embeddings=tied)


def _qwen3_5_moe() -> Any:
    text = {**ROPE, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 8}
    return _vision("Qwen3_5Moe", text, SEEN_3, tied=False)


# Name -> its configuration.
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **TEXT, **EXPERTS, **LINEAR, shared_expert_intermediate_size=8, tie_word_embeddings=True
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**TEXT | LATENT, **ROUTED),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**TEXT, **ROUTED, head_dim=8),
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=5, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **TEXT, num_local_experts=5, num_experts_per_tok=2, head_dim=8, layer_types=["full_attention"] * 2
    ),
    "qwen2_vl": lambda: _vision("Qwen2VL", ROPE, SEEN_2, tied=False),
    "qwen2_vl_tied": lambda: _vision("Qwen2VL", ROPE, SEEN_2, tied=True),
    "qwen2_5_vl": lambda: _vision("Qwen2_5_VL", ROPE, {**SEEN_3, "fullatt_block_indexes": [0]}, tied=False),
    "qwen3_vl": lambda: _vision("Qwen3VL", {**ROPE, "head_dim": 8}, SEEN_3, tied=False),
    "qwen3_vl_tied": lambda: _vision("Qwen3VL", {**ROPE, "head_dim": 8}, SEEN_3, tied=True),
    "qwen3_vl_moe": lambda: _vision("Qwen3VLMoe", {**ROPE, **EXPERTS, "head_dim": 8}, SEEN_3, tied=False),
    "qwen3_5": lambda: _vision("Qwen3_5", {**ROPE, **LINEAR}, SEEN_3, tied=True),
    "qwen3_5_moe": lambda: _qwen3_5_moe(),
    "qwen3_5_moe_fused": lambda: _qwen3_5_moe(),
}
# Parts of names of what checkpoints keep in float32.
FLOAT32 = ("A_log", "e_score_correction_bias")
# Checkpoints with fused experts: as they are, or with their last two axes the other way round than in transformers 5.
FUSED, TRANSPOSED = ("qwen3_5_moe_fused",), ("qwen3_vl_moe",)


def base_of(name: str, folder: Path) -> Path:
    """The checkpoint of an architecture: bfloat16, but for what is kept in float32."""
    torch.manual_seed(0)
    config = ARCHITECTURES[name]()
    auto = transformers.AutoModelForImageTextToText if has_images(config) else transformers.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn_like(tensor))  # nothing is all zeros or all ones
    model.save_pretrained(folder, max_shard_size="40KB", save_original_format=name not in FUSED)
    for file in folder.glob("*.safetensors"):
        tensors = {key: _stored(name, key, tensor) for key, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    _name_type(folder / "config.json")
    return folder


def has_images(config: Any) -> bool:
    """Whether it is one of a vision-language model."""
    return getattr(config, "vision_config", None) is not None


def _stored(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    if name in TRANSPOSED and ".mlp.experts." in key:
        tensor = tensor.transpose(1, 2).contiguous()
    return tensor if any(part in key for part in FLOAT32) else tensor.bfloat16()


def _name_type(path: Path) -> None:
    content = json.loads(path.read_text())
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "bfloat16"
    path.write_text(json.dumps(content, indent=2))
