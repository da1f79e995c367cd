"""The rollout ``cpu`` as verl sees it: the adapter inside each worker, and the replica that owns a server."""

import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
import torch
from torch.distributed.device_mesh import DeviceMesh
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.utils import ensure_async_iterator

from verl_cpu.server import GenerationServer


def server_name(replica_rank: int) -> str:
    """The name under which a replica's server is known in Ray."""
    return f"verl_cpu_server_{replica_rank}"


class ServerAdapter(BaseRollout):
    """Hands a worker's weights to the server of its replica. Memory calls have nothing to do on a CPU."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, device_mesh: DeviceMesh | None, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        ranks_per_replica = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ["RANK"])
        self.replica_rank = replica_rank if replica_rank >= 0 else rank // ranks_per_replica
        self.is_leader_rank = rank % ranks_per_replica == 0

    async def resume(self, tags: list[str]) -> None:
        return None

    async def release(self) -> None:
        return None

    async def update_weights(
        self,
        weights: Iterator[tuple[str, torch.Tensor]] | AsyncIterator[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = False,
        **kwargs: Any,
    ) -> None:
        if wire_format != "named_tensors":
            raise NotImplementedError(f"the cpu rollout takes whole tensors, not {wire_format!r}")
        # Every rank drains: gathering a sharded tensor is a collective. Only the leader keeps a copy.
        named_tensors = {}
        async for name, tensor in ensure_async_iterator(weights):
            if self.is_leader_rank:
                named_tensors[name] = tensor.detach().clone()
        if self.is_leader_rank:
            server = ray.get_actor(server_name(self.replica_rank))
            # With LoRA verl sends the base once, and from then on adapters alone.
            adapter = peft_config if base_sync_done else None
            await server.load_weights.remote(named_tensors, global_steps, adapter)


class CpuReplica(RolloutReplica):
    """One generation server, however many ranks the replica spans."""

    async def launch_servers(self) -> None:
        name = server_name(self.replica_rank)
        server = (
            ray.remote(GenerationServer)
            .options(name=name, num_cpus=1, max_concurrency=self.max_concurrency)
            .remote(
                model_path=self.model_config.path,
                dtype=self.config.dtype,
                max_tokens=self.config.response_length,
            )
        )
        await server.ready.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = name
