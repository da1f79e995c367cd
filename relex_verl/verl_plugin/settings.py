"""verl's configuration as RELEX reads it: the options of `+relex=...`, their check, and what identifies the run."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from relex_verl.run.config import ConfigError, RelexConfig

if TYPE_CHECKING:
    from relex_verl.run.protocol import RunFacts

__all__ = ["MODES", "checked_config", "option_node", "run_facts"]

# Hydra option -> verl's trainer mode. The RELEX trainer of a mode is registered as "relex_<mode>".
MODES = {"default": "sync", "colocate_async": "colocate_async", "separate_async": "separate_async"}


def option_node(mode: str) -> dict[str, Any]:
    """What `+relex=<option>` merges into the run's configuration (package `_global_`).

    Args:
        mode: verl's trainer mode.
    """
    return {
        "relex": asdict(RelexConfig()),
        "trainer": {"v1": {"trainer_mode": f"relex_{mode}"}},
        # Hydra calls it in the driver before verl's main: mistakes are refused before Ray starts.
        "hydra": {"callbacks": {"relex": {"_target_": "relex_verl.verl_plugin.early_check.EarlyCheck"}}},
    }


def checked_config(config: DictConfig) -> RelexConfig:
    """The `relex` node, checked together with the verl keys that it depends on.

    Raises:
        ConfigError: a value that cannot work.
    """
    relex = RelexConfig.from_mapping(OmegaConf.to_container(config.relex, resolve=True))  # type: ignore[arg-type]
    if not config.trainer.use_v1:
        raise ConfigError("trainer.use_v1", False, "RELEX extends verl's v1 trainer: set trainer.use_v1=true")
    mode = str(config.trainer.v1.trainer_mode)
    if not mode.startswith("relex_"):
        options = ", ".join(f"+relex={option} ({verl_mode})" for option, verl_mode in MODES.items())
        raise ConfigError("trainer.v1.trainer_mode", mode, f"this switches RELEX off; choose the mode by {options}")
    model = config.actor_rollout_ref.model
    for key in ("lora_rank", "lora.rank", "lora_adapter_path"):
        value = OmegaConf.select(model, key)
        if value:
            cure = "RELEX does not follow LoRA adapters yet: train full weights, or without +relex"
            raise ConfigError(f"actor_rollout_ref.model.{key}", value, cure)
    return relex


def run_facts(config: DictConfig) -> "RunFacts":
    """What identifies the run."""
    from relex_verl.run.protocol import RunFacts  # not in each process that Hydra's options are stored in

    trainer = config.trainer
    base_model = str(config.actor_rollout_ref.model.path)
    return RunFacts(base_model, trainer.project_name, trainer.experiment_name, trainer.resume_mode)
