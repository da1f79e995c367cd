"""The encodings' arithmetic, compiled to touch each byte once; the same bits as the torch code that it stands in for.

Nothing is imported before it is needed: a compiler takes a second to load, and some more where what it made is not kept on
disk. Where it does not load or compile, the torch code goes on alone.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

__all__ = ["WORTH", "compiled", "disable", "load", "warm_up"]

logger = logging.getLogger(__name__)
# Elements below which loading the compiler takes longer than the torch code does.
WORTH = 2**22
_state = {"loaded": False, "refused": False}


def compiled(reference: Callable[..., Any], module: str, **fixed: Any) -> Callable[..., Any]:
    """A function of an encoding, by its kernel where there is one for these arguments.

    Args:
        reference: whose first argument is a shard, or some other flat tensor of as many elements; a list never loads them.
        module: of this package; its function of the same name may return NotImplemented.
        fixed: further arguments of both.
    """

    def call(*arguments: Any) -> Any:
        if _state["loaded"] or (len(arguments[0]) >= WORTH and load()):
            kernels = import_module(f"{__name__}.{module}")
            try:
                result = getattr(kernels, reference.__name__)(*arguments, **fixed)
            except _errors() as error:  # of the compiler, before anything was computed
                disable(error)
                result = NotImplemented
            if result is not NotImplemented:
                return result
        return reference(*arguments, **fixed)

    return call


@cache
def _errors() -> type[Exception]:
    error: type[Exception] = import_module(f"{__name__}.compile").NumbaError
    return error


def load() -> bool:
    """Use the kernels from now on, for shards of any size; False where they cannot be had."""
    if not (_state["loaded"] or _state["refused"]):
        try:
            for module in ("entries", "moments", "quantized", "sparse"):
                import_module(f"{__name__}.{module}")
            _state["loaded"] = True
        except Exception as error:
            disable(error)
    return _state["loaded"]


def warm_up(elements: int, work: Callable[[], None]) -> None:
    """Have compiled what `work` calls, for a rank with so many elements: not in the first step that is observed."""
    if elements >= WORTH and load():
        try:
            work()
        except Exception as error:
            disable(error)


def disable(error: Exception) -> None:
    """Compute with torch alone from now on, and say so once."""
    if not _state["refused"]:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("RELEX computes without its compiled kernels, and takes longer for the same result: %s", said)
    _state.update(loaded=False, refused=True)
