"""Which tensors of the checkpoint a parameter of a transformers model is, and which verl sends to the rollout for it.

What the checkpoint has is what transformers would save for a parameter (`trajectory.saved_as`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint, resolve_model
from relex_verl.trajectory.saved_as import saved_as
from relex_verl.trajectory.shards import Placement, block_placement
from relex_verl.verl_plugin.blocks import Box, Piece, Shape, blocks_of_range, joined, pieces_of_views, strides

__all__ = ["HubLayout", "HubPart", "model_of"]


# Size, stride and offset of a view of a flat tensor.
View = tuple[Shape, Shape, int]


@dataclass(frozen=True)
class HubPart:
    """Which elements of a tensor of the checkpoint a part of an engine's shard is.

    Attributes:
        name, shape: of the tensor.
        placement: which of its elements.
        views: where they lie in the flat shard, in the same order: size, stride and offset of each view of it.
    """

    name: str
    shape: Shape
    placement: Placement
    views: tuple[View, ...]

    def cut_out(self, local: torch.Tensor) -> torch.Tensor:
        """These elements of the shard, flat: a view where they lie together."""
        pieces = [view.reshape(-1) for view in self._views(local)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def put(self, local: torch.Tensor, data: torch.Tensor) -> None:
        """Set these elements of the shard, in place."""
        for view, values in zip(self._views(local), data.split([prod(size) for size, _, _ in self.views]), strict=True):
            view.copy_(values.view(view.shape))

    def _views(self, local: torch.Tensor) -> list[torch.Tensor]:
        return [local.as_strided(size, stride, local.storage_offset() + offset) for size, stride, offset in self.views]


class HubLayout:
    """How the parameters of one engine's model stand in its base checkpoint.

    Attributes:
        known: name of each parameter that has been asked for -> its shape, and the tensors of the checkpoint that it is.
        stacks: name of each of them that the engine itself would cut up, though the checkpoint does not -> its converter,
            from (first row, some rows) to named tensors.
    """

    def __init__(self, model: Any, base: BaseCheckpoint | None) -> None:
        """Nothing is asked yet.

        Args:
            model: of transformers.
            base: its checkpoint; None where every parameter stands in it as it is.
        """
        self._model, self._base = model, base
        self.known: dict[str, tuple[Shape, tuple[Piece, ...]]] = {}
        self.stacks: dict[str, Callable[[int, torch.Tensor], Any]] = {}

    @classmethod
    def of(cls, engine: Any) -> "HubLayout":
        """That of a verl engine: of its local copy of the base, if its model is one of transformers."""
        from transformers import PreTrainedModel

        model = model_of(engine)
        if not isinstance(model, PreTrainedModel):
            return cls(model, None)
        return cls(model, BaseCheckpoint(resolve_model(engine.model_config.local_path)))

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the checkpoint."""
        return self._base is not None

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this name."""
        return self._base is not None and name in self._base.entries

    def is_stored(self, name: str) -> bool:
        """Whether the checkpoint has a parameter, under whatever name."""
        return self.has(self.hub_name(name))

    def pieces(self, name: str, shape: Shape) -> tuple[Piece, ...]:
        """The tensors of the checkpoint that a parameter of this name and shape is.

        Raises:
            ValueError: transformers would compute them, or need other parameters too.
        """
        if name not in self.known:
            itself = Piece(name, shape, Box((0,) * len(shape), shape), tuple(range(len(shape))))
            self.known[name] = shape, self._asked(name, shape) if self._is_converted(name, shape) else (itself,)
        return self.known[name][1]

    def hub_name(self, name: str) -> str:
        """What a parameter that is not cut up is called in the checkpoint."""
        if self._base is None or name in self._base.entries:
            return name
        return str(next(iter(saved_as(self._model, self._base, name, torch.empty(1, device="meta"))), name))

    def parts(self, name: str, shape: Shape, place: Any, local: torch.Tensor) -> list[HubPart]:
        """The parts of tensors of the checkpoint that a shard of a parameter holds.

        Args:
            name, shape: of the whole parameter.
            place: of the shard in it: a flat start, or verl's `BlockPlacement`.
            local: (n,) the shard, just loaded: what is converted must be the base's, or its place is not understood.

        Raises:
            ValueError: see `pieces`.
        """
        parts = self._parts(name, shape, place, local.numel())
        entries = {} if self._base is None else self._base.entries
        for part in parts if self._is_converted(name, shape) else ():
            if part.name not in entries or entries[part.name].shape != part.shape:
                continue  # whoever compares names and shapes with the base says so
            assert self._base is not None
            stored = self._base.read(part.name, part.placement).to(local.device, local.dtype)
            if not torch.equal(part.cut_out(local), stored):
                raise ValueError(
                    f"{name} is not what transformers is known to make of {part.name} in the base checkpoint: it would be "
                    "written to the wrong place"
                )
        return parts

    def _parts(self, name: str, shape: Shape, place: Any, numel: int) -> list[HubPart]:
        pieces = self.pieces(name, shape)
        if not numel:
            return []
        if isinstance(place, int):
            boxes, stride = list(blocks_of_range(shape, place, place + numel)), strides(shape)
            first = -place
        else:
            boxes, stride = [Box(tuple(place.global_offset), tuple(place.local_shape))], strides(place.local_shape)
            first = -sum(at * step for at, step in zip(place.global_offset, stride, strict=True))
        parts = []
        for piece in pieces:
            runs: list[tuple[int, int]] = []
            views: list[View] = []
            for box in boxes:
                common = box & piece.box
                if common is None:
                    continue
                at, size = piece.of(common)
                placement = block_placement(size, at, piece.shape)
                runs += zip(placement.full_start, placement.length, strict=True)
                offset = first + sum(i * step for i, step in zip(common.start, stride, strict=True))
                _append(views, (size, tuple(stride[axis] for axis in piece.axes), offset))
            if views:
                parts.append(HubPart(piece.name, piece.shape, joined(runs), tuple(views)))
        return parts

    def _is_converted(self, name: str, shape: Shape) -> bool:
        return self._base is not None and (name not in self._base.entries or self._base.entries[name].shape != shape)

    def _asked(self, name: str, shape: Shape) -> tuple[Piece, ...]:
        parameter = torch.empty(shape, dtype=torch.uint8, device="meta")
        try:
            return pieces_of_views(parameter, saved_as(self._model, self._base, name, parameter).items())
        except Exception as error:
            raise ValueError(
                f"{name} is not in the base checkpoint, and how transformers makes it of what is there cannot be followed "
                f"({error})"
            ) from error


def _append(views: list[View], view: View) -> None:
    """Add a view; elements that lie in a row, also behind those of the view before, are one flat view and never copied."""
    size, stride, offset = view
    if all(n == 1 or step == flat for n, step, flat in zip(size, stride, strides(size), strict=True)):
        begin, length = offset, prod(size)
        if views and views[-1][1] == (1,) and views[-1][2] + views[-1][0][0] == begin:
            (before,), _, begin = views.pop()
            length += before
        size, stride, offset = (length,), (1,), begin
    views.append((size, stride, offset))


def model_of(engine: Any) -> Any:
    """The model of a verl engine, without FSDP1's wrapper; of a pipeline's stages the first."""
    module = engine.module[0] if isinstance(engine.module, list) else engine.module
    return getattr(module, "_fsdp_wrapped_module", module)
