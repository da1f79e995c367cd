"""LoRA as verl's configuration and an adapter's own tell it: what RELEX follows, and what it refuses before Ray starts."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from relex_verl.run.config import ConfigError

__all__ = ["check_adapter", "check_lora"]

MODEL = "actor_rollout_ref.model"
WITHOUT = "or train without +relex"
# Of `adapter_config.json`: what it has to say, if anything, and what makes adapters more than A, B and a scale.
PLAIN = {"peft_type": "LORA", "bias": "none"}
EXTRAS = (
    "use_dora", "modules_to_save", "target_parameters", "lora_bias", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "layer_replication", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip


def check_lora(config: DictConfig) -> None:
    """Refuse LoRA that RELEX does not follow, as far as the configuration and a local adapter tell.

    Args:
        config: verl's, composed.

    Raises:
        ConfigError: with the key, its value and the cure.
    """
    keys = ("lora_rank", "lora.rank", "lora.adapter_path", "lora_adapter_path")
    rank, *others, path = values = [OmegaConf.select(config, f"{MODEL}.{key}") for key in keys]
    given = [(f"{MODEL}.{key}", value) for key, value in zip(keys, values, strict=True) if value]
    if not given:
        return
    strategy = config.actor_rollout_ref.actor.strategy
    if strategy not in ("fsdp", "fsdp2"):
        cure = f"with actor.strategy={strategy} RELEX follows no adapters: use fsdp or fsdp2, train full weights, {WITHOUT}"
        raise ConfigError(*given[0], cure)
    for key, value in zip(keys[1:3], others, strict=True):
        if value:
            cure = "verl's FSDP engines read lora_rank and lora_adapter_path, and pass over this: set those"
            raise ConfigError(f"{MODEL}.{key}", value, cure)
    if not rank:
        raise ConfigError(*given[0], "verl loads the adapter only with lora_rank above 0: give its rank there")
    if str(config.trainer.v1.trainer_mode).endswith("separate_async"):
        _check_stand_alone(config)
    elif strategy == "fsdp" and not OmegaConf.select(config, f"{MODEL}.lora.merge") and not _peft_knows_fsdp1():
        cure = (
            f"peft {version('peft')} finds no adapters in verl's FSDP1: verl sends none, and the rollout samples from the "
            "base. Set lora.merge=true or actor.strategy=fsdp2, or install peft below 0.21"
        )
        raise ConfigError(f"{MODEL}.lora.merge", False, cure)
    parameters = OmegaConf.select(config, f"{MODEL}.target_parameters")
    if parameters:
        cure = "RELEX follows adapters of linear layers only: name modules in target_modules"
        raise ConfigError(f"{MODEL}.target_parameters", parameters, f"{cure}, {WITHOUT}")
    kind = OmegaConf.select(config, f"{MODEL}.lora.type")
    if kind == "dora":
        raise ConfigError(
            f"{MODEL}.lora.type", kind, "verl's FSDP engines train plain LoRA whatever this says: set lora"
        )
    adapter = Path(os.path.expanduser(str(path))) / "adapter_config.json"
    if path and adapter.is_file():
        check_adapter(json.loads(adapter.read_text()), str(path))


def _check_stand_alone(config: DictConfig) -> None:
    """Stand-alone rollouts get whole weights only: verl 0.9.1 has no path for adapters to them."""
    merge = bool(OmegaConf.select(config, f"{MODEL}.lora.merge"))
    if not merge:
        cure = "verl 0.9.1 sends the stand-alone rollouts of separate_async no adapters: set lora.merge=true"
        raise ConfigError(f"{MODEL}.lora.merge", merge, f"{cure}, or take another mode")
    backend = config.actor_rollout_ref.rollout.checkpoint_engine.backend
    if backend == "delta_sharded":
        cure = "verl 0.9.1 sends no adapters this way: take another backend"
        raise ConfigError("actor_rollout_ref.rollout.checkpoint_engine.backend", backend, cure)


def _peft_knows_fsdp1() -> bool:
    """Whether peft finds adapters in a wrapped model by the names without FSDP1's own; since 0.21 it does not."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch.nn import Linear, Module, Sequential

    model = get_peft_model(Sequential(Linear(1, 1)), LoraConfig(r=1, target_modules=["0"]))
    named, wrapper = dict(model.named_parameters()), Module()
    wrapper._fsdp_wrapped_module = model.base_model.model
    model.base_model.model = wrapper
    return bool(get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False))


def check_adapter(adapter: Mapping[str, Any], path: str | None) -> None:
    """Refuse adapters that are more than A and B beside a linear layer.

    Args:
        adapter: the content of `adapter_config.json`.
        path: `lora_adapter_path`, which it was read from; None where verl has made it of its configuration.

    Raises:
        ConfigError: with the key, its value and the cure.
    """
    key = f"{MODEL}.lora_adapter_path" if path else f"{MODEL}.lora_rank"
    differing = [name for name, value in PLAIN.items() if adapter.get(name, value) != value]
    differing += [name for name in EXTRAS if adapter.get(name)]
    if differing:
        said = ", ".join(f"{name}={adapter[name]!r}" for name in differing)
        cure = f"has {said}: RELEX follows A and B of linear layers only. Give a plain LoRA adapter, {WITHOUT}"
        raise ConfigError(key, path or adapter.get("r"), cure)
