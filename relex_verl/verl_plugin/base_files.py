"""What the base model's files tell before Ray starts, where they lie on this machine. Nothing is downloaded.

As in `refusals`: one function a reason. A file that is not there or cannot be read tells nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from relex_verl.run.config import ConfigError

__all__ = ["CHECKS", "folder_of"]

INDEX = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf")
# Names that a quantised checkpoint gives to its weights or to their scales.
QUANTISED = (".weight_scale_inv", ".weight_scale", ".qweight", ".weight_packed", "_proj_blocks")


def check_format(config: DictConfig) -> None:
    """Weights as safetensors, the one format that RELEX reads, and in which it writes predictions."""
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    folder = folder_of(model.path)
    if folder is None or any(folder.glob("*.safetensors")) or (folder / INDEX).exists():
        return
    others = sorted(file.name for file in folder.glob("*") if file.suffix in OTHER_FORMATS)
    elsewhere = actor.strategy == "megatron" and actor.megatron.use_dist_checkpointing
    if others or elsewhere:
        there = f"the folder has {others[0]} and no safetensors" if others else "the folder holds no safetensors"
        cure = "convert the model once by AutoModelForCausalLM.from_pretrained(...).save_pretrained(...), and give that"
        raise ConfigError("actor_rollout_ref.model.path", model.path, f"{there}: {cure}")


def check_quantisation(config: DictConfig) -> None:
    """Weights that are stored as they are trained, not as codes and scales."""
    model = config.actor_rollout_ref.model
    cure = "RELEX moves weights, and these are codes with scales: give the model in bfloat16 or float32"
    for key in ("hf_config_path", "path"):
        declared = _quantisation(_json(folder_of(model[key]), "config.json"))
        if declared:
            said = f"its config.json declares {declared}"
            raise ConfigError(f"actor_rollout_ref.model.{key}", model[key], f"{said}. {cure}")
    scales = [name for name in _tensors(folder_of(model.path)) if name.endswith(QUANTISED)]
    if scales:
        raise ConfigError("actor_rollout_ref.model.path", model.path, f"its checkpoint has {scales[0]}. {cure}")


def folder_of(model: str | None) -> Path | None:
    """The folder of a model where it is one, or the snapshot in the Hub's cache; None where neither is here."""
    if not model:
        return None
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(str(model), "config.json")
    except ValueError:  # no name that the Hub knows
        return None
    return Path(found).parent if isinstance(found, str) else None


def _quantisation(config: Any) -> str | None:
    """How a model's configuration says that it is quantised, or None."""
    if not isinstance(config, dict):
        return None
    for part in (config, config.get("text_config")):
        declared = part.get("quantization_config") if isinstance(part, dict) else None
        if declared:
            method = declared.get("quant_method", "") if isinstance(declared, dict) else declared
            return f"quantization_config ({method})"
    return None


def _tensors(folder: Path | None) -> list[str]:
    """Names of the stored tensors, by the index, else by the headers."""
    index = _json(folder, INDEX)
    if isinstance(index, dict):
        return list(index.get("weight_map", ()))
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        except (OSError, SafetensorError):
            continue
    return names


def _json(folder: Path | None, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text()) if folder else None
    except (OSError, ValueError):
        return None


CHECKS: list[Callable[[DictConfig], None]] = [check_format, check_quantisation]
