"""Tell Hydra about `+relex=default|colocate_async|separate_async` and verl about the trainers behind them."""

import functools
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import wrapt

__all__ = ["MODES", "option_node", "register"]

logger = logging.getLogger("relex_verl")

# Hydra option -> verl's trainer mode. The RELEX trainer of a mode is registered as "relex_<mode>".
MODES = {"default": "sync", "colocate_async": "colocate_async", "separate_async": "separate_async"}


def register() -> None:
    """Register lazily: importing verl's trainers takes seconds, and most processes need neither."""
    wrapt.register_post_import_hook(_store_options, "hydra.core.config_store")
    wrapt.register_post_import_hook(_register_trainers, "verl.trainer.ppo.v1")


def option_node(mode: str) -> dict[str, Any]:
    """What `+relex=<option>` merges into the run's configuration (package `_global_`).

    Args:
        mode: verl's trainer mode.
    """
    from relex_verl.config import RelexConfig

    return {
        "relex": asdict(RelexConfig()),
        "trainer": {"v1": {"trainer_mode": f"relex_{mode}"}},
        # Hydra calls it in the driver before verl's main: mistakes are refused before Ray starts.
        "hydra": {"callbacks": {"relex": {"_target_": "relex_verl.verl_plugin.early_check.EarlyCheck"}}},
    }


def _harmless(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    """An exception in a hook would come out of the import that it follows: of Hydra's, or of verl's own trainers."""

    @functools.wraps(hook)
    def wrapper(module: Any) -> None:
        try:
            hook(module)
        except Exception:
            logger.error("relex-verl could not be loaded; +relex=... will not work", exc_info=True)

    return wrapper


@_harmless
def _store_options(config_store: Any) -> None:
    store = config_store.ConfigStore.instance()
    for option, mode in MODES.items():
        store.store(group="relex", name=option, node=option_node(mode), package="_global_", provider="relex-verl")


@_harmless
def _register_trainers(_module: Any) -> None:
    import relex_verl.verl_plugin.trainer  # noqa: F401  (its decorators register)
