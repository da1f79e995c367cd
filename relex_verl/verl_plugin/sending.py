"""Whole tensors of the checkpoint as verl sends them to the rollout: it names and cuts some of them otherwise."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from relex_verl.verl_plugin.blocks import Piece, pieces_of_views
from relex_verl.verl_plugin.hub_layout import HubLayout

__all__ = ["Sending"]

Named = tuple[str, torch.Tensor]


class _Sent(NamedTuple):
    """What verl sends of a tensor of the checkpoint.

    Attributes:
        name: that verl gives it.
        block: of the tensor.
        order: of the block's axes.
    """

    name: str
    block: tuple[slice | int, ...]
    order: tuple[int, ...]

    def cut_out(self, tensor: torch.Tensor) -> Iterator[Named]:
        """It, of the whole tensor."""
        yield self.name, tensor[self.block].permute(self.order).contiguous()


class Sending:
    """From the tensors of the checkpoint to what verl's exporter would yield for the same weights."""

    def __init__(self, engine: Any, layout: HubLayout, ties: Mapping[str, str]) -> None:
        """Nothing is asked yet.

        Args:
            engine: verl's.
            layout: how its parameters stand in the checkpoint.
            ties: tied name -> the name that holds its elements, in the engine.
        """
        self._engine, self._layout = engine, layout
        self._tied = {layout.hub_name(name): name for name in ties}

    def of(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """Each whole tensor of the checkpoint under the names that verl gives it, in the pieces that verl makes of it.

        Raises:
            ValueError: verl sends in one piece what the checkpoint keeps in several.
        """
        table, unfuses = self._table(), _unfuses(self._engine)
        for hub_name, tensor in tensors:
            if hub_name in self._tied:
                yield self._tied[hub_name], tensor
            elif hub_name in table:
                for sent in table[hub_name]:
                    yield from sent(tensor)
            elif unfuses and self._layout.is_known:
                raise ValueError(f"{hub_name}: it is not known how verl sends this tensor to the rollout")
            else:
                yield hub_name, tensor

    def _table(self) -> dict[str, list[Callable[[torch.Tensor], Iterable[Named]]]]:
        """Name in the checkpoint -> all that verl sends of it."""
        from verl.workers.engine.fsdp.utils import unfuse_moe_params

        table: dict[str, list[Callable[[torch.Tensor], Iterable[Named]]]] = {}
        for name, (shape, pieces) in self._layout.known.items():
            if name in self._layout.stacks:
                (piece,) = pieces
                table[piece.name] = [partial(_rows, self._layout.stacks[name], piece)]
                continue
            parameter = torch.empty(shape, dtype=torch.uint8, device="meta")
            sends: Iterable[Named] = [(name, parameter)]
            if _unfuses(self._engine):
                sends = unfuse_moe_params(sends, self._engine.model_config.hf_config.model_type)
            by_box = {piece.box: piece for piece in pieces}
            for sent in pieces_of_views(parameter, sends):
                holder = by_box.get(sent.box) or next((one for one in pieces if one.box & sent.box == sent.box), None)
                if holder is None:
                    raise ValueError(f"verl sends {sent.name} in one piece, and the checkpoint keeps it in several")
                table.setdefault(holder.name, []).append(_sent_of(holder, sent).cut_out)
        return table


def _rows(
    convert: Callable[[int, torch.Tensor], Iterable[Named]], piece: Piece, tensor: torch.Tensor
) -> Iterable[Named]:
    """An expert stack of the checkpoint by way of the engine's converter, which takes rows of its own stack."""
    return convert(0, tensor.permute([piece.axes.index(axis) for axis in range(tensor.ndim)]))


def _unfuses(engine: Any) -> bool:
    """Whether it is FSDP's own exporter, which cuts expert stacks up."""
    from verl.workers.engine.fsdp import FSDPEngine

    return getattr(type(engine), "get_per_tensor_param", None) is FSDPEngine.get_per_tensor_param


def _sent_of(holder: Piece, sent: Piece) -> _Sent:
    start, length = holder.of(sent.box)
    kept = [axis for axis in holder.axes if axis in sent.axes]
    block = tuple(
        slice(at, at + n) if axis in sent.axes else at for at, n, axis in zip(start, length, holder.axes, strict=True)
    )
    return _Sent(sent.name, block, tuple(kept.index(axis) for axis in sent.axes))
