"""verl's FSDP engines from inside: a rank's own weights where they lie, and the optimizer's state beside them.

Nothing here is collective: FSDP1 keeps a rank's part of each unit in one flat tensor, in which every parameter has at most
one contiguous run; FSDP2 keeps a block of each parameter. Both are read, and written, in place.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from relex_verl.trajectory.shards import Placement, block_placement

__all__ = [
    "Own",
    "has_float32_master",
    "kept_state",
    "own_weights",
    "placement_of",
    "reset_optimizer",
    "reshard",
    "restore_state",
    "settle",
]

# Name in the module, (n,) this rank's elements of it, verl's ShardSpec of where they lie in the whole tensor.
Own = tuple[str, torch.Tensor, Any]
# What FSDP1 and activation checkpointing put into the names of a module's parameters.
WRAPPERS = re.compile(r"_(fsdp|checkpoint)_wrapped_module\.")


def has_float32_master(engine: Any) -> str | None:
    """None where the engine's parameters are float32 and can be read shard by shard, else the reason why not."""
    from verl.workers.engine.fsdp import FSDPEngine

    if not isinstance(engine, FSDPEngine) or type(engine).get_per_tensor_param_shard is not (
        FSDPEngine.get_per_tensor_param_shard
    ):
        return f"{type(engine).__name__} hands out bfloat16 weights only"
    dtype = next(parameter.dtype for parameter in engine.module.parameters() if parameter.requires_grad)
    return (
        None
        if dtype == torch.float32
        else f"the engine's parameters are {dtype}, not float32 (fsdp_config.model_dtype)"
    )


def own_weights(engine: Any) -> Iterator[Own]:
    """This rank's parameters and persistent buffers as they are kept, on whatever device they are: writing changes them.

    In the order of the module, the same at every call. FSDP1 hands a tied weight out under its first name, FSDP2 under both.
    """
    from verl.utils.fsdp_utils import fsdp_version
    from verl.workers.engine.spec import ShardSpec

    if fsdp_version(engine.module) == 1:
        yield from _flat_weights(engine.module)
        return
    for name, tensor in engine.module.state_dict().items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        yield name, local.detach().view(-1), ShardSpec.from_param(tensor)


def _flat_weights(module: torch.nn.Module) -> Iterator[Own]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from verl.workers.engine.spec import ShardSpec

    flat: set[str] = set()
    for prefix, unit in module.named_modules():
        handle = unit._handle if isinstance(unit, FullyShardedDataParallel) else None
        if handle is None:
            continue
        parameter = handle.flat_param
        # Set with the first forward pass; later `data` may be the gathered weights of the whole unit.
        local = getattr(parameter, "_local_shard", parameter).detach()
        shared = [f"{info.module_name}.{info.param_name}" for info in parameter._shared_param_infos]
        flat |= {_plain(f"{prefix}.{name}") for name in (*parameter._fqns, *shared)}
        for name, shape, part in zip(parameter._fqns, parameter._shapes, parameter._shard_param_infos, strict=True):
            # One of which this rank holds nothing too: every rank knows all names.
            run = local.narrow(0, part.offset_in_shard or 0, part.numel_in_shard or 0)
            yield _plain(f"{prefix}.{name}"), run, ShardSpec(tuple(shape), place=part.intra_param_start_idx or 0)
    for prefix, part in module.named_modules():
        lasting = {name: one for name, one in part._buffers.items() if name not in part._non_persistent_buffers_set}
        for name, tensor in (*part._parameters.items(), *lasting.items()):
            full_name = _plain(f"{prefix}.{name}")
            if tensor is not None and full_name not in flat and name != "_flat_param":
                yield full_name, tensor.detach().view(-1), ShardSpec(tuple(tensor.shape))


def placement_of(spec: Any, elements: int) -> Placement:
    """Where so many elements of a rank lie in their parameter, as verl's ShardSpec says."""
    from verl.workers.engine.spec import derive_dtensor_placement

    place = spec.place if spec.place is not None else derive_dtensor_placement(spec)[0]
    if isinstance(place, int):
        return Placement((place,), (elements,))
    return block_placement(place.local_shape, place.global_offset, tuple(spec.full_shape))


def _plain(name: str) -> str:
    return WRAPPERS.sub("", name).removeprefix(".")


def reshard(engine: Any) -> None:
    """Let go of gathered weights, which would be used on although the rank's own ones have been set."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for unit in engine.module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
        elif isinstance(unit, FullyShardedDataParallel) and unit._handle is not None:
            handle = unit._handle
            # The root's stay allocated after a pass without a backward one, and are taken for those of the next.
            began = handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded")
            if began and not (handle.is_sharded(handle.flat_param) and handle.needs_unshard()):
                handle.reshard(free_unsharded_flat_param=True)


def reset_optimizer(engine: Any) -> None:
    """As it was before the first step; the learning-rate schedule goes on."""
    engine.optimizer.state.clear()


def settle() -> None:
    """Wait for what is under way on the device: verl moves weights to the host beside it."""
    from verl.utils.device import get_torch_device

    get_torch_device().synchronize()


def kept_state(engine: Any, own: Callable[[Any], Iterator[Own]] = own_weights) -> dict[str, torch.Tensor]:
    """This rank's weights and optimizer state in place, by their place in the engine's own order.

    Args:
        engine: verl's.
        own: hands out the weights that are trained.

    Raises:
        ValueError: the optimizer keeps something else than tensors.
    """
    settle()
    kept = {f"weight.{i}": local for i, (_, local, _) in enumerate(own(engine))}
    for i, parameter in enumerate(_optimized(engine)):
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"{type(engine.optimizer).__name__} keeps {key}={value!r}, which cannot be kept for an undo: give "
                    "relex.jump_undo=false"
                )
            kept[f"state.{i}.{key}"] = _local(value).detach()
    return kept


def restore_state(
    engine: Any, kept: Mapping[str, torch.Tensor], own: Callable[[Any], Iterator[Own]] = own_weights
) -> None:
    """Set weights and optimizer state to what `kept_state` gave, bit by bit; arguments as there.

    Raises:
        ValueError: it is that of another engine, or was cut otherwise; nothing has been changed then.
    """
    now = kept_state(engine, own)
    for name, tensor in kept.items():
        local = now.get(name)
        if local is None or (local.shape, local.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(f"{name}: what was kept is that of another engine, or was cut otherwise between the ranks")
    if any(name.startswith("weight.") and name not in kept for name in now):
        raise ValueError("what was kept lacks some of the weights")
    for name, tensor in kept.items():
        now[name].copy_(tensor)
    for i, parameter in enumerate(_optimized(engine)):  # one that had none before has none again
        if not any(name.startswith(f"state.{i}.") for name in kept):
            engine.optimizer.state.pop(parameter, None)
    reshard(engine)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _optimized(engine: Any) -> list[torch.nn.Parameter]:
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
