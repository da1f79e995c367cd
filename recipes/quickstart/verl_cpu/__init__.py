"""Lets verl 0.9.1 train on a machine that has no accelerator, through verl's own extension points.

Load it with ``VERL_USE_EXTERNAL_MODULES=verl_cpu VERL_PLATFORM=cpu`` and this folder's parent on
``PYTHONPATH``. verl then finds

- a platform ``cpu`` (`platform.py`),
- a training worker on gloo and FSDP engines for the device ``cpu`` (`engine.py`),
- a rollout named ``cpu`` (`rollout.py` is the worker's side, `server.py` generates),

and a config may name an agent loop that seeds every sample (`agent_loop.yaml`) and a replay buffer
that orders every batch (`sampler.py`).

Importing this package stays cheap: everything but the platform waits for the verl module it extends.
"""

from typing import Any

import wrapt

from verl_cpu import platform  # noqa: F401  (registers itself; verl asks for it while it is being imported)

ROLLOUT_NAME = "cpu"


def _extend_workers(engine_workers: Any) -> None:
    """Train on gloo. Set on the base class so that every worker class that inherits from it follows."""
    from verl_cpu.engine import GlooTrainingWorker

    engine_workers.ActorRolloutRefWorker.actor_worker_cls = GlooTrainingWorker
    engine_workers.ActorRolloutRefWorker.ref_worker_cls = GlooTrainingWorker


def _extend_rollouts(rollout_base: Any) -> None:
    rollout_base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "verl_cpu.rollout.ServerAdapter"


def _extend_replicas(replica: Any) -> None:
    def load() -> type:
        from verl_cpu.rollout import CpuReplica

        return CpuReplica

    replica.RolloutReplicaRegistry.register(ROLLOUT_NAME, load)


wrapt.register_post_import_hook(_extend_workers, "verl.workers.engine_workers")
wrapt.register_post_import_hook(_extend_rollouts, "verl.workers.rollout.base")
wrapt.register_post_import_hook(_extend_replicas, "verl.workers.rollout.replica")
