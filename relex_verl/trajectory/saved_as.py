"""What transformers saves for a parameter of a model: tensors of other names, or cut out of it, as its own table says.

transformers 5 renames tensors and fuses experts while it loads a model, and takes both back when it saves one. It is asked
here what it would save for a parameter: one without elements, so that every tensor that comes out is a view which tells by
its strides what part of the parameter it is. So no architecture is known by name, and what would compute new values is seen.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint

__all__ = ["saved_as"]


def saved_as(model: Any, base: BaseCheckpoint | None, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name in a checkpoint -> tensor, for one parameter.

    Args:
        model: of transformers, with or without elements.
        base: its checkpoint.
        name: of the parameter in the model.
        parameter: on the meta device; what is only renamed or cut out of it is a view of it.

    Raises:
        Exception: of transformers, where it needs other parameters too.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved: Any = _Saved(model, base)
    with _Unmoved():
        return dict(revert_weight_conversion(saved, {name: parameter}))


class _Saved:
    """A model as `revert_weight_conversion` asks it: its conversions, and the shapes that its checkpoint has.

    transformers takes a transposition back only where the shapes tell that there was one.
    """

    def __init__(self, model: Any, base: BaseCheckpoint | None) -> None:
        self.config, self._base = model.config, base
        self._weight_conversions = getattr(model, "_weight_conversions", None)
        if self._weight_conversions is None:  # of an engine that loads weights in its own way: what the table says
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import PrefixChange

            table = get_model_conversion_mapping(model, add_legacy=False)
            self._weight_conversions = [one for one in table if not isinstance(one, PrefixChange)]

    def get_parameter(self, name: str) -> torch.Tensor:
        assert self._base is not None
        return torch.empty(self._base.entries[name].shape, device="meta")


class _Unmoved(TorchDispatchMode):
    """Copies of a tensor without elements are the tensor itself, so that its strides tell where they came from."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))
