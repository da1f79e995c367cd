"""Training on the CPU: a worker on gloo, and FSDP1 and FSDP2 engines for the device ``cpu``."""

import os
from itertools import chain

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.fsdp.api import (
    FullStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict, get_fsdp_wrap_policy
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import TrainingWorkerConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.fsdp.utils import get_sharding_strategy
from verl.workers.engine_workers import TrainingWorker


class GlooTrainingWorker(TrainingWorker):
    """verl's training worker, on a process group that it starts itself.

    verl would name the backend ``cpu:gloo,cpu:gloo``, one entry for the host and one for the device,
    which torch refuses when both are the CPU. It leaves an existing group alone.
    """

    def __init__(self, config: TrainingWorkerConfig) -> None:
        initialize_global_process_group_ray(backend="cpu:gloo")
        # Ray gives an actor one thread. A fixed count also keeps sums in one order from run to run.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
        super().__init__(config)


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CpuFSDPEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine; only the wrapping differs, since FSDP's own start-up expects an accelerator."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        precision = self.engine_config.mixed_precision or {}
        dtypes = {
            "param_dtype": PrecisionType.to_dtype(precision.get("param_dtype", "bf16")),
            "reduce_dtype": PrecisionType.to_dtype(precision.get("reduce_dtype", "fp32")),
        }
        self._autocast_dtype = dtypes["param_dtype"]
        self.scaler = None
        if self.engine_config.strategy == "fsdp":
            buffer_dtype = PrecisionType.to_dtype(precision.get("buffer_dtype", "fp32"))
            return self._wrap_fsdp1(module, MixedPrecision(**dtypes, buffer_dtype=buffer_dtype))
        return self._wrap_fsdp2(module, MixedPrecisionPolicy(**dtypes, cast_forward_inputs=True))

    def _wrap_fsdp1(self, module: torch.nn.Module, mixed_precision: MixedPrecision) -> torch.nn.Module:
        _broadcast_from_rank_zero(module)
        wrapped = FullyShardedDataParallel(
            module,
            auto_wrap_policy=get_fsdp_wrap_policy(
                module=module, config=self.engine_config.wrap_policy, is_lora=self.model_config.lora_rank > 0
            ),
            device_id=torch.device("cpu"),
            sharding_strategy=get_sharding_strategy(
                self.device_mesh, zero3_enable=self.engine_config.reshard_after_forward
            ),
            mixed_precision=mixed_precision,
            sync_module_states=False,  # refuses modules on the CPU; done above, by hand
            device_mesh=self.device_mesh,
            forward_prefetch=self.engine_config.forward_prefetch,
            use_orig_params=self.engine_config.use_orig_params,
        )
        if dist.get_world_size() == 1:
            FullyShardedDataParallel.set_state_dict_type(
                wrapped, state_dict_type=StateDictType.FULL_STATE_DICT, state_dict_config=FullStateDictConfig()
            )
        else:
            FullyShardedDataParallel.set_state_dict_type(
                wrapped, state_dict_type=StateDictType.SHARDED_STATE_DICT, state_dict_config=ShardedStateDictConfig()
            )
        return wrapped

    def _wrap_fsdp2(self, module: torch.nn.Module, mixed_precision: MixedPrecisionPolicy) -> torch.nn.Module:
        full_state = module.state_dict()
        fsdp_kwargs = {
            "mesh": self.device_mesh,
            "mp_policy": mixed_precision,
            "offload_policy": None,  # the reference model would get pinned memory, which needs an accelerator
            "reshard_after_forward": self.engine_config.reshard_after_forward,
        }
        apply_fsdp2(module, fsdp_kwargs, self.engine_config)
        fsdp2_load_full_state_dict(module, full_state, self.device_mesh, None)
        return module


def _broadcast_from_rank_zero(module: torch.nn.Module) -> None:
    """Give every rank rank zero's weights. The others may hold meta tensors: verl loads the model once."""
    if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
        module.to_empty(device="cpu")
    for tensor in chain(module.parameters(), module.buffers()):
        dist.broadcast(tensor.detach(), src=0)
