"""Checkpoints that are LoRA adapters: merged into the base, so that the run is followed like any other.

What the adapters were before the first step is in no checkpoint (A starts at random), but W_0 + s B A is W_0 then.
"""

import json
from pathlib import Path

import torch

from relex_verl.offline.merging import DOWN, UP, layers_of, merged_tensors
from relex_verl.trajectory.checkpoint_writer import CheckpointWriter
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint

__all__ = ["AdapterError", "check_not_peft", "merge_adapter"]


CURE = "merge it with peft (model.merge_and_unload(), save_pretrained) and give those folders"
CONFIG = "adapter_config.json"


class AdapterError(ValueError):
    """An adapter that cannot be followed."""


def merge_adapter(folder: Path, base: BaseCheckpoint, out: Path) -> Path:
    """Full weights, laid out like the base; those that have adapters in float32, which keeps small changes.

    Args:
        folder: with `adapter_model.safetensors` and `adapter_config.json`.
        base: the base model.
        out: is made.

    Raises:
        AdapterError: something else than LoRA's A and B is trained, how they are scaled is not known, or the base does not
            have the layers.
    """
    adapter = BaseCheckpoint(folder)
    tensors = {name.replace(".default.", "."): adapter.read(name) for name in adapter.entries}
    others = sorted(name for name in tensors if not name.endswith((DOWN, UP)))
    if others:
        raise AdapterError(f"the adapter holds {others[0]} besides LoRA's A and B, which cannot be followed: {CURE}")
    if not (folder / CONFIG).exists():
        raise AdapterError(
            f"this is a LoRA adapter without {CONFIG}, and only its lora_alpha says how B A is scaled: put it there, or "
            f"{CURE}"
        )
    config = json.loads((folder / CONFIG).read_text())
    if not config.get("lora_alpha") or config.get("use_dora"):
        said = "use_dora" if config.get("use_dora") else f"lora_alpha={config.get('lora_alpha')}"
        raise AdapterError(f"{CONFIG} says {said}, with which its product is not known: {CURE}")
    try:
        layers = layers_of(tensors, base)
        writer = CheckpointWriter(base, out, set(layers), {}, torch.float32)
        writer.begin()
        for shard in merged_tensors(base, tensors, config):
            writer.write(shard)
    except (ValueError, KeyError) as error:
        raise AdapterError(f"{' '.join(map(str, error.args))}: give the --base that it was trained on") from error
    return writer.commit()


def check_not_peft(names: set[str]) -> None:
    """Refuse a model that was saved with the adapters in it: how they are scaled, no file there says.

    Raises:
        AdapterError: it has adapters.
    """
    inside = sorted(name for name in names if ".lora_A." in name or ".lora_B." in name or ".lora_embedding_" in name)
    if inside:
        raise AdapterError(
            f"it holds LoRA adapters inside the model ({inside[0]}), and no lora_alpha that says how they are scaled: {CURE}"
        )
