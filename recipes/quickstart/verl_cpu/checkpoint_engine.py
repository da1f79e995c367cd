"""Weights from trainers to stand-alone rollouts, for the trainer mode `separate_async`.

Set `actor_rollout_ref.rollout.checkpoint_engine.backend=store` and
`actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_cpu.checkpoint_engine`.

The first trainer puts all weights into a key-value store of its own, in one piece: they are a few megabytes.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import ray
import torch
from safetensors.torch import load, save
from torch.distributed import TCPStore
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

WEIGHTS = "weights"
TIMEOUT = timedelta(minutes=5)


@CheckpointEngineRegistry.register("store")
class StoreCheckpointEngine(CheckpointEngine):
    """One `TCPStore` for each synchronisation."""

    def __init__(self, bucket_size: int, is_master: bool = False, **_: Any) -> None:
        self.is_master = is_master
        self.store: TCPStore | None = None

    def prepare(self) -> tuple[str, int] | None:
        """The store's address, from the process that serves it."""
        if not self.is_master:
            return None
        self.store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return ray.util.get_node_ip_address(), self.store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        address = next(entry for entry in metadata if entry is not None)
        return {"address": [address] * actor_wg_world_size}, {"address": [address] * rollout_world_size}

    def init_process_group(self, address: tuple[str, int]) -> None:
        if self.store is None:
            self.store = TCPStore(address[0], address[1], is_master=False, wait_for_workers=False, timeout=TIMEOUT)

    async def send_weights(self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None) -> dict:
        # Every trainer drains: gathering a sharded tensor is a collective.
        named_tensors = {}
        for name, tensor in weights:
            if self.is_master:
                named_tensors[name] = tensor.detach().clone().contiguous()
        if self.is_master:
            assert self.store is not None
            await asyncio.to_thread(self.store.set, WEIGHTS, save(named_tensors))
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        assert self.store is not None
        packed = await asyncio.to_thread(self.store.get, WEIGHTS)  # waits until it is there
        for name, tensor in load(packed).items():
            yield name, tensor

    def finalize(self) -> None:
        self.store = None
