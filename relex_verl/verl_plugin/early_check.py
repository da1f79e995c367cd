"""Refuse, before Ray starts, what can be seen from the configuration alone."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.registration import warn_of_another_verl
from relex_verl.verl_plugin.settings import checked_config

__all__ = ["EarlyCheck"]


class EarlyCheck(Callback):
    """Hydra callback of `+relex=...`. Hydra turns a callback's exception into a warning, hence SystemExit."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the composed configuration.

        Raises:
            SystemExit: with the key, its value and the cure.
        """
        warn_of_another_verl()
        try:
            relex = checked_config(config)
            steps = OmegaConf.select(config, "trainer.total_training_steps")
            if steps is not None:
                relex.plan(steps)
        except ConfigError as error:
            raise SystemExit(f"relex-verl: {error}") from None
