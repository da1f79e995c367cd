"""LoRA adapters merged into their base, tensor by tensor: no model is built.

W = W_0 + s B A with PEFT's s = alpha / r, or alpha / sqrt(r) with rank stabilisation (Kalajdzievski 2023, arXiv:2312.03732).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from relex_verl.pipeline.prediction import write_laid_out_like
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import TensorShard, whole
from relex_verl.trajectory.store import Trajectory

__all__ = ["merged_tensors", "write_merged"]

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Initialisations after which the base in the run is not the one on disk.
OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def write_merged(
    trajectory: Trajectory,
    shards: Iterable[TensorShard],
    folder: Path,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda elements: None,
) -> Path:
    """Write full weights from a trajectory's adapters, laid out like the base model. The adapters are held in memory.

    Args:
        trajectory: of LoRA adapters.
        shards: every shard of every rank.
        folder: the destination.
        provenance: for `relex.json`.
        progress: called with the number of elements of each shard of the adapters.

    Raises:
        ValueError: it follows whole weights, or adapters that do not fit the base model.
    """
    if not trajectory.index.adapters:
        raise ValueError(
            f"{trajectory.folder} follows whole weights: only LoRA adapters can be merged, leave --merge out"
        )
    config = json.loads((trajectory.base().folder / "adapter_config.json").read_text())
    adapters = {name: torch.zeros(shape) for name, shape in trajectory.index.tensors.items()}
    for shard in shards:
        for local, full, length in shard.placement.runs():
            adapters[shard.name].view(-1)[full : full + length] = shard.data[local : local + length]
        progress(shard.placement.numel)
    base = trajectory.base_model()
    return write_laid_out_like(
        base, layers_of(adapters, base), merged_tensors(base, adapters, config), folder, provenance
    )


def layers_of(adapters: Iterable[str], base: BaseCheckpoint) -> dict[str, str]:
    """Name of the base's weight -> name of the module that has adapters beside it.

    Raises:
        ValueError: the base has no such weight.
    """
    modules = [name.removeprefix("base_model.model.").removesuffix(DOWN) for name in adapters if name.endswith(DOWN)]
    unknown = sorted(module for module in modules if f"{module}.weight" not in base.entries)
    if unknown:
        raise ValueError(
            f"{base.folder} has no {unknown[0]}.weight, which an adapter is trained beside: its files name or tie weights "
            "otherwise than the model does. Write the adapter (without --merge), and merge it with peft's merge_and_unload"
        )
    return {f"{module}.weight": module for module in modules}


def merged_tensors(
    base: BaseCheckpoint, adapters: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Iterator[TensorShard]:
    """W of every layer that has adapters, whole, in float32.

    Args:
        base: the base model.
        adapters: name in PEFT's file -> tensor.
        config: the content of `adapter_config.json`.

    Raises:
        ValueError: the base beside the adapters is not the one on disk, or not linear.
    """
    if str(config.get("init_lora_weights", True)).startswith(OF_THE_BASE):
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']!r} has changed the base's weights: merge with peft instead"
        )
    for name, module in layers_of(adapters, base).items():
        down, up = (adapters[f"base_model.model.{module}{part}"].float() for part in (DOWN, UP))
        weight = base.read(name).float()
        change = _scale(config, module, len(down)) * (up @ down) if down.dim() == 2 else up
        change = change.T if config.get("fan_in_fan_out") else change
        if change.shape != weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, its adapters {tuple(up.shape)} {tuple(down.shape)}"
            )
        yield TensorShard(name, tuple(weight.shape), whole(weight.shape), (weight + change).flatten())


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """As PEFT scales B A: a pattern is a regular expression for the end of a module's name."""
    patterns = (config.get("alpha_pattern") or {}).items()
    given = (float(alpha) for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(given, float(config["lora_alpha"]))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)
