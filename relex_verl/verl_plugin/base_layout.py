"""Whether the model that transformers would build of the base's files can be followed under FSDP; see `hub_layout`.

The model is built without elements and no weight is read, so that a base of any size is looked at in seconds.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig

from relex_verl.pipeline.resuming import check_names
from relex_verl.run.config import ConfigError
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.verl_plugin.base_files import folder_of
from relex_verl.verl_plugin.hub_layout import HubLayout
from relex_verl.verl_plugin.ties import tied_names

__all__ = ["check_layout"]


def check_layout(config: DictConfig) -> None:
    """Every parameter is in the checkpoint, as it is or as a block of it that transformers only moves.

    What verl would train otherwise, by other code or another configuration than the folder's, is left to the start.
    """
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    folder = folder_of(model.path)
    others = (
        model.get("hf_config_path"),
        model.get("override_config"),
        model.get("lora_rank"),
        model.get("external_lib"),
    )
    if actor.strategy not in ("fsdp", "fsdp2") or folder is None or any(others):
        return
    try:
        built, base = _without_elements(folder)
    except Exception:  # what cannot be built here tells nothing; verl says what it lacks
        return
    layout = HubLayout(built, base)
    tied = tied_names(SimpleNamespace(module=built), layout)
    apart = {*tied, *tied.values()}
    try:
        parameters = [(name, tuple(one.shape)) for name, one in built.named_parameters() if name not in apart]
        pieces = [piece for name, shape in parameters for piece in layout.pieces(name, shape)]
        check_names([(piece.name, piece.shape) for piece in pieces], base)
    except ValueError as error:
        said = f"{error}. Train another model, or without +relex"
        raise ConfigError("actor_rollout_ref.model.path", model.path, said) from error


def _without_elements(folder: Path) -> tuple[Any, BaseCheckpoint]:
    """The model of a folder as verl's FSDP engines choose its class, on the meta device, and its checkpoint."""
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from verl.utils.model import get_hf_auto_model_class

    base = BaseCheckpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = get_hf_auto_model_class(config).from_config(config)
    # A model remembers which of its conversions its checkpoint needed, and takes those back when it is saved.
    table: list[Any] = get_model_conversion_mapping(model)
    converters = [one for one in table if isinstance(one, WeightConverter)]
    renamings = [one for one in table if not isinstance(one, WeightConverter)]
    for name in base.entries:
        rename_source_key(name, renamings, converters)
    model._weight_conversions = [one for one in table if one.was_used()]
    return model, base
