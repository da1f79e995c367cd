"""Refuse, before Ray starts, what can be seen from the main, the configuration, and files on this machine."""

from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.base_layout import check_layout
from relex_verl.verl_plugin.mains import check_main
from relex_verl.verl_plugin.refusals import MODES
from relex_verl.verl_plugin.registration import warn_of_another_verl
from relex_verl.verl_plugin.run_length import check_length
from relex_verl.verl_plugin.settings import checked_config

__all__ = ["EarlyCheck"]

TRAINER_MODE = "trainer.v1.trainer_mode"


class EarlyCheck(Callback):
    """Hydra callback of `+relex=...`. Hydra turns a callback's exception into a warning, hence SystemExit."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Let verl's name of the chosen mode stand for RELEX's. Later is too late: the main gets a copy."""
        mode = _chosen_mode(config)
        if mode is not None and OmegaConf.select(config, TRAINER_MODE) == mode:
            config.trainer.v1.trainer_mode = f"relex_{mode}"

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """The same for a sweep, of which each job is composed anew from the overrides."""
        overrides = config.hydra.overrides
        said = f"{TRAINER_MODE}={_chosen_mode(config)}"
        overrides.task = [one for one in overrides.task if one.lstrip("+") != said]

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check main and composed configuration.

        Raises:
            SystemExit: with the key, its value and the cure.
        """
        _refusing(lambda: _check(config, kwargs.get("task_function")))


def _chosen_mode(config: DictConfig) -> str | None:
    """verl's mode behind the option of `+relex=` that this run was given."""
    return MODES.get(str(OmegaConf.select(config, "hydra.runtime.choices.relex")))


def _check(config: DictConfig, task: Callable[..., Any] | None) -> None:
    warn_of_another_verl()
    if task is not None:
        check_main(task)  # first: the configuration of another main may lack every key
    check_length(checked_config(config), config)
    check_layout(config)  # last: it takes seconds with a large model


def _refusing(check: Callable[[], None]) -> None:
    """Refuse on every exception: what is no refusal with its cure is said with the error."""
    try:
        check()
    except ConfigError as error:
        raise SystemExit(f"relex-verl: {error}") from None
    except Exception as error:
        said = f"the configuration could not be checked, so RELEX does not start: {type(error).__name__}: {error}"
        raise SystemExit(f"relex-verl: {said}") from error
