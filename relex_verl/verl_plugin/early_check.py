"""Refuse, before Ray starts, what can be seen from the configuration alone."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from relex_verl.config import ConfigError, RelexConfig
from relex_verl.verl_plugin.registration import MODES

__all__ = ["EarlyCheck", "checked_config"]


class EarlyCheck(Callback):
    """Hydra callback of `+relex=...`. Hydra turns a callback's exception into a warning, hence SystemExit."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the composed configuration.

        Raises:
            SystemExit: with the key, its value and the cure.
        """
        try:
            relex = checked_config(config)
            steps = OmegaConf.select(config, "trainer.total_training_steps")
            if steps is not None:
                relex.plan(steps)
        except ConfigError as error:
            raise SystemExit(f"relex-verl: {error}") from None


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
