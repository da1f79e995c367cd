"""verl's sharded weight exporters as a `ShardSource`: one path for every engine that has one.

`engine.get_per_tensor_param_shard()` yields each rank's bf16 shards with a `ShardSpec`. Where the engine's parameter is
that of transformers, the spec's DTensor placement says which block of it a shard is, and transformers which tensors of the
checkpoint it is (`hub_layout`). Everywhere else (Megatron's fused projections) the engine's own converter is asked, see
`conversion`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from relex_verl.trajectory.shards import TensorShard
from relex_verl.verl_plugin import fsdp
from relex_verl.verl_plugin.conversion import Part, converted_parts
from relex_verl.verl_plugin.fsdp import Own, has_float32_master, own_weights
from relex_verl.verl_plugin.hub_layout import HubLayout, HubPart
from relex_verl.verl_plugin.sending import Sending
from relex_verl.verl_plugin.ties import tied_names

__all__ = ["EngineSource", "VerlEngine"]

Exported = Iterator[tuple[str, torch.Tensor]]


class VerlEngine:
    """A verl engine as `protocol.Engine`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._layout = HubLayout.of(engine)
        self._ties = tied_names(engine, self._layout)
        self._source: EngineSource | None = None

    @property
    def no_master(self) -> str | None:
        """See `has_float32_master`."""
        return has_float32_master(self._engine)

    @property
    def optimizer_on_host(self) -> bool:
        """Whether verl offloads the optimizer's state."""
        return bool(self._engine.is_optimizer_offload_enabled)

    @property
    def aliases(self) -> dict[str, str]:
        """Tied name -> the name that holds its elements, in the checkpoint."""
        return {self._layout.hub_name(tied): self._layout.hub_name(name) for tied, name in self._ties.items()}

    @property
    def adapters(self) -> None:
        """Whole weights; an engine with adapters is an `AdapterEngine`."""

    def shards(self, master: bool) -> "EngineSource":
        """The engine's weights."""
        self._source = EngineSource(self._engine, master, self._layout)
        return self._source

    def as_sent(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors of the checkpoint as verl's own exporter would name and cut them for the rollout."""
        return Sending(self._engine, self._layout, self._ties).of(tensors)

    def assign(self, shards: Sequence[TensorShard]) -> None:
        """See `EngineSource.assign`."""
        assert self._source is not None
        self._source.assign(shards)

    def reset_optimizer(self) -> None:
        """See `fsdp.reset_optimizer`."""
        fsdp.reset_optimizer(self._engine)

    def state(self) -> Mapping[str, torch.Tensor]:
        """See `fsdp.kept_state`."""
        return fsdp.kept_state(self._engine)

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `fsdp.restore_state`."""
        fsdp.restore_state(self._engine, state)

    def exporter(self, tensors: Callable[[], Exported]) -> Callable[..., tuple[Exported, None]]:
        """What verl's weight update calls in place of the engine's `get_per_tensor_param`, to send other weights.

        Args:
            tensors: collective: name and whole tensor of each of the checkpoint, on all ranks.
        """

        def export(**_: Any) -> tuple[Exported, None]:
            return self.as_sent(tensors()), None

        return export


class EngineSource:
    """The shards of a verl engine. Iterating is collective: all ranks iterate, to the end.

    Attributes:
        master: yield the float32 master weights instead of their bfloat16 rounding; see `has_float32_master`.
        ties: tied name -> the name that holds its elements, in the engine.
    """

    def __init__(self, engine: Any, master: bool = False, layout: HubLayout | None = None) -> None:
        self.engine = engine
        self.master = master
        self.layout = layout or HubLayout.of(engine)
        self.ties = tied_names(engine, self.layout)
        self._parts: dict[str, list[Part] | list[HubPart]] = {}

    def __iter__(self) -> Iterator[TensorShard]:
        for name, local, spec in self._exported():
            if not local.is_floating_point() or name in self.ties:
                continue
            local = local.detach().flatten()
            if name not in self._parts:
                self._parts[name] = self._locate(name, local, spec)
            for part in self._parts[name]:
                yield TensorShard(part.name, part.shape, part.placement, part.cut_out(local))

    def _exported(self) -> Iterator[tuple[str, torch.Tensor, Any]]:
        if not self.master:
            exported, _ = self.engine.get_per_tensor_param_shard()
            yield from exported
            return
        yield from self._own()

    def _own(self) -> Iterator[Own]:
        """The master weights in place, under the names of the checkpoint."""
        from verl.utils.model import convert_weight_keys

        own = {name: (local, spec) for name, local, spec in own_weights(self.engine)}
        for tied, name in self.ties.items():
            if tied in own and name not in own:  # FSDP1 knows a tied weight by its first name alone
                own[name] = own.pop(tied)
        module = getattr(self.engine.module, "_fsdp_wrapped_module", self.engine.module)
        for name, (local, spec) in convert_weight_keys(own, module).items():
            yield name, local, spec

    def assign(self, shards: Sequence[TensorShard]) -> None:
        """Set the master weights. Nothing is exchanged: each rank sets what it holds.

        Args:
            shards: float32, of all tensors that this rank holds, placed as they were handed out.

        Raises:
            ValueError: a tensor is missing, or placed otherwise; nothing has been set then.
        """
        fsdp.settle()
        targets = {
            part.name: (local, part)
            for name, local, _ in self._own()
            if name not in self.ties
            for part in self._parts.get(name, ())
            if part.placement.numel
        }
        given = {shard.name: shard for shard in shards}
        if given.keys() != targets.keys():
            one = min(given.keys() ^ targets.keys())
            raise ValueError(f"{one}: this rank has a copy of it that another rank counts, or the other way round")
        if any(given[name].placement != part.placement for name, (_, part) in targets.items()):
            raise ValueError("the engine cuts its weights otherwise than they are to be set")
        for name, (local, part) in targets.items():
            part.put(local, given[name].data)
        fsdp.reshard(self.engine)

    def _locate(self, name: str, local: torch.Tensor, spec: Any) -> list[Part] | list[HubPart]:
        if self.master and spec.place is not None:  # FSDP1: a run of the parameter
            return self.layout.parts(name, tuple(spec.full_shape), spec.place, local)
        if self._is_whole_stack(name, spec):
            self.layout.stacks[name] = spec.to_hf_chunk
            return self.layout.parts(name, tuple(spec.full_shape), spec.place, local)
        if spec.place is None and spec.to_hf_chunk is None and spec.hf_slots is None and self._is_identity(name, spec):
            from verl.workers.engine.spec import derive_dtensor_placement

            return self.layout.parts(name, tuple(spec.full_shape), derive_dtensor_placement(spec)[0], local)
        return self._converted(name, local, spec)

    def _is_whole_stack(self, name: str, spec: Any) -> bool:
        """Whether the checkpoint keeps a stack of experts as it is, which the engine would cut up (VeOmni)."""
        if spec.to_hf_chunk is None or not spec.hf_slots:
            return False
        return self.layout.has(name) and not self.layout.has(spec.hf_slots[0][0])

    def _is_identity(self, name: str, spec: Any) -> bool:
        """Whether the engine's converter leaves this parameter as it is: asked with an empty change."""
        empty = torch.empty(0, dtype=torch.int64)
        slots = self.engine._hf_delta_entry(name, spec, 0, empty, empty.to(torch.bfloat16))[0]
        return [(slot, tuple(shape)) for slot, shape in slots] == [(name, tuple(spec.full_shape))]

    def _converted(self, name: str, local: torch.Tensor, spec: Any) -> list[Part]:
        """Where the engine's converter puts this shard.

        Raises:
            ValueError: it computes new values, or scatters them.
        """
        from verl.workers.engine.spec import BlockPlacement, derive_dtensor_placement

        place = spec.place if spec.place is not None else derive_dtensor_placement(spec)[0]
        shape = place.local_shape if isinstance(place, BlockPlacement) else spec.full_shape

        def convert(positions: torch.Tensor, values: torch.Tensor) -> Any:
            positions, values = positions.to(local.device), values.to(local.device)
            slots, _, counts, index, value = self.engine._hf_delta_entry(name, spec, place, positions, values)
            return slots, counts, index.cpu().long(), value.cpu().long()

        try:
            return converted_parts(convert, local.numel(), int(shape[-1]) if shape else 1)
        except ValueError as error:
            raise ValueError(f"{name} of {type(self.engine).__name__} cannot be followed: {error}") from None
