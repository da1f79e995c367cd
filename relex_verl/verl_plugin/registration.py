"""Tell Hydra about `+relex=default|colocate_async|separate_async` and verl about the trainers behind them."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import wrapt

__all__ = ["register"]

logger = logging.getLogger("relex_verl")


def register() -> None:
    """Register lazily: importing verl's trainers takes seconds, and most processes need neither."""
    wrapt.register_post_import_hook(_store_options, "hydra.core.config_store")
    wrapt.register_post_import_hook(_register_trainers, "verl.trainer.ppo.v1")


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
    from relex_verl.verl_plugin.settings import MODES, option_node

    store = config_store.ConfigStore.instance()
    for option, mode in MODES.items():
        store.store(group="relex", name=option, node=option_node(mode), package="_global_", provider="relex-verl")


@_harmless
def _register_trainers(_module: Any) -> None:
    import relex_verl.verl_plugin.trainer  # noqa: F401  (its decorators register)
