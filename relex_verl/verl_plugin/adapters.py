"""LoRA adapters in verl's FSDP engines: their configuration, their names, and other values for a while.

A and B are parameters like all others, in float32 unless the base's are not, sharded as FSDP shards them; what makes them
different is that the base beside them is frozen and that no base model on disk has them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from relex_verl.trajectory.shards import TensorShard
from relex_verl.verl_plugin import fsdp
from relex_verl.verl_plugin.fsdp import Own, has_float32_master, own_weights, placement_of, reshard
from relex_verl.verl_plugin.lora import check_adapter

__all__ = ["AdapterEngine", "AdapterSource", "adapter_name", "other_adapters", "peft_config"]

Exported = Iterator[tuple[str, torch.Tensor]]

# A parameter of peft's only adapter, which verl leaves under its default name.
PARAMETER = re.compile(r"(.*\.lora_[AB])\.default\.weight")


def peft_config(engine: Any) -> Any:
    """peft's configuration of the adapters that an engine trains; None where it trains the weights themselves."""
    module = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
    return getattr(module, "peft_config", {}).get("default")


def adapter_config(engine: Any) -> dict[str, Any] | None:
    """The content of `adapter_config.json` as peft saves it; None where no adapters are trained.

    Raises:
        ConfigError: adapters that RELEX does not follow.
    """
    config = peft_config(engine)
    if config is None:
        return None
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    content |= {"inference_mode": True, "base_model_name_or_path": str(engine.model_config.path)}
    plain: dict[str, Any] = json.loads(json.dumps(content))  # its enumerations are text
    check_adapter(plain, engine.model_config.lora_adapter_path)
    return plain


def adapter_name(parameter: str) -> str | None:
    """The name of an adapter's parameter in PEFT's files; None for a parameter of the frozen base.

    Raises:
        ValueError: an adapter of something else than a linear layer.
    """
    if "lora_" not in parameter:
        return None
    match = PARAMETER.fullmatch(parameter)
    if match is None:
        raise ValueError(f"{parameter}: RELEX follows adapters of linear layers only: leave its module out")
    return f"{match[1]}.weight"


def own_adapters(engine: Any) -> Iterator[Own]:
    """A rank's adapters by their names in PEFT's files, see `own_weights`."""
    for parameter, local, spec in own_weights(engine):
        name = adapter_name(parameter)
        if name is not None:
            yield name, local, spec


class AdapterEngine:
    """A verl engine that trains adapters as `protocol.Engine`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

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
        """Adapters are tied to nothing, whatever their base is."""
        return {}

    @property
    def adapters(self) -> dict[str, Any] | None:
        """See `adapter_config`."""
        return adapter_config(self._engine)

    def shards(self, master: bool) -> "AdapterSource":
        """A and B, and nothing of the frozen base."""
        return AdapterSource(self._engine, torch.float32 if master else torch.bfloat16)

    def assign(self, shards: Sequence[TensorShard]) -> None:
        """Set the adapters. Nothing is exchanged: each rank sets what it holds.

        Args:
            shards: float32, of all adapters that this rank holds, placed as they were handed out.

        Raises:
            ValueError: one is missing, or placed otherwise; nothing has been set then.
        """
        fsdp.settle()
        targets = {name: (local, placement_of(spec, local.numel())) for name, local, spec in own_adapters(self._engine)}
        given = {shard.name: shard for shard in shards}
        held = {name for name, (local, _) in targets.items() if local.numel()}
        if not held <= given.keys() <= targets.keys():
            one = min((given.keys() - targets.keys()) | (held - given.keys()))
            raise ValueError(f"{one}: this rank has a copy of it that another rank counts, or the other way round")
        if any(given[name].placement != targets[name][1] for name in held):
            raise ValueError("the engine cuts its adapters otherwise than they are to be set")
        for name in held:
            targets[name][0].copy_(given[name].data)
        reshard(self._engine)

    def reset_optimizer(self) -> None:
        """See `fsdp.reset_optimizer`."""
        fsdp.reset_optimizer(self._engine)

    def state(self) -> Mapping[str, torch.Tensor]:
        """See `fsdp.kept_state`: of the adapters; the base is frozen."""
        return fsdp.kept_state(self._engine, own_adapters)

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `fsdp.restore_state`."""
        fsdp.restore_state(self._engine, state, own_adapters)

    def exporter(self, tensors: Callable[[], Exported]) -> Callable[..., tuple[Exported, Any]]:
        """What verl's weight update calls in place of the engine's `get_per_tensor_param`, to send other adapters.

        Args:
            tensors: collective: name in PEFT's files and whole tensor of each, on all ranks.
        """
        engine = self._engine
        own = type(engine).get_per_tensor_param

        def export(layered_summon: bool = False, base_sync_done: bool = False, **_: Any) -> tuple[Exported, Any]:
            if engine.model_config.lora.get("merge", False):
                return _merged(engine, tensors), None
            if not base_sync_done:
                # A rollout that has no base yet gets it before the adapters; no scoring changes it.
                base, config = own(engine, layered_summon=layered_summon, base_sync_done=False)
                return base, config
            return _named(engine, tensors()), peft_config(engine).to_dict()

        return export


class AdapterSource:
    """A rank's part of the adapters, read in place: nothing is gathered."""

    def __init__(self, engine: Any, dtype: torch.dtype) -> None:
        """Args: verl's engine, and the type to hand out: float32, or bfloat16 for the rounding of it."""
        self._engine, self._dtype = engine, dtype

    def __iter__(self) -> Iterator[TensorShard]:
        from verl.utils.device import get_device_id

        for name, local, spec in own_adapters(self._engine):
            # Weights that verl keeps on the host change on the device, step by step.
            data = local.to(get_device_id(), self._dtype, non_blocking=True)
            yield TensorShard(name, tuple(spec.full_shape), placement_of(spec, local.numel()), data)


def _named(engine: Any, adapters: Exported) -> Exported:
    """On the host and by the names by which verl sends them."""
    from verl.utils.model import convert_weight_keys

    module = getattr(engine.module, "_fsdp_wrapped_module", engine.module)
    for name, tensor in adapters:
        yield from convert_weight_keys({name: tensor.cpu()}, module).items()


def _merged(engine: Any, adapters: Callable[[], Exported]) -> Exported:
    """The base's weights with other adapters merged in, by verl's own exporter."""
    with other_adapters(engine, dict(adapters())):
        weights, _ = type(engine).get_per_tensor_param(engine, base_sync_done=True)
        yield from weights


@contextmanager
def other_adapters(engine: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give an engine's adapters other values, and their own back bit for bit, whatever happens meanwhile.

    Args:
        engine: verl's, FSDP1 or FSDP2.
        tensors: name in PEFT's files -> the whole tensor, the same on all ranks.
    """
    from verl.utils.device import get_torch_device

    get_torch_device().synchronize()  # verl moves weights to the host beside what runs on the device
    own = [local.clone() for _, local, _ in own_adapters(engine)]
    try:
        for name, local, spec in own_adapters(engine):
            whole = tensors[name].flatten()
            runs = placement_of(spec, local.numel()).runs()
            local.copy_(torch.cat([whole[:0], *(whole[start : start + length] for _, start, length in runs)]))
        reshard(engine)
        yield
    finally:
        get_torch_device().synchronize()
        for data, (_, local, _) in zip(own, own_adapters(engine), strict=True):  # verl may have moved them meanwhile
            local.copy_(data)
        reshard(engine)
