"""Tell Hydra about `+relex=default|colocate_async|separate_async` and verl about the trainers behind them."""

import functools
import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import wrapt

from relex_verl import __version__

__all__ = ["MADE_FOR", "register", "warn_of_another_verl"]

logger = logging.getLogger("relex_verl")

# The verl that the plugin overrides and whose private names it calls; tests/verl_plugin/test_contract.py lists them.
MADE_FOR = "0.9.1"


def register() -> None:
    """Register lazily: importing verl's trainers takes seconds, and most processes need neither."""
    wrapt.register_post_import_hook(_store_options, "hydra.core.config_store")
    wrapt.register_post_import_hook(_register_trainers, "verl.trainer.ppo.v1")


@functools.cache  # once a process
def warn_of_another_verl() -> None:
    """Log a warning where the installed verl is not the one that the plugin was made for. Never raises."""
    try:
        installed = version("verl") or "?"
    except Exception:  # a checkout on PYTHONPATH has no metadata
        installed = "?"
    if installed.split("+")[0] == MADE_FOR:  # a build of one's own keeps the public version
        return
    logger.warning(
        "RELEX: relex-verl %s was made for verl %s and tested with no other, but this is verl %s: +relex=... may fail "
        "or go wrong. Install verl==%s, or look for a relex-verl made for yours (pip install --upgrade relex-verl)",
        __version__, MADE_FOR, installed, MADE_FOR,
    )  # fmt: skip


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
    warn_of_another_verl()  # first: it explains an import that fails
    import relex_verl.verl_plugin.trainer  # noqa: F401  (its decorators register)
