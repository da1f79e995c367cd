"""RELEX's trainers, made as verl makes them, with stand-ins below them: what happens to the rollout, in which order.

What verl's `init` would start (Ray's workers, replicas that generate) cannot exist in a process without an accelerator.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode
from verl_config import composed

# What verl's separate_async demands of a configuration.
SEPARATE = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "trainer.v1.separate_async.parameter_sync_step=1",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
]


class Replicas:
    """verl's checkpoint manager: writes down what it is asked for, and fails where it is told to."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.fails = name, log, ""

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> dict:
            self.log.append(f"{self.name}{method.removesuffix('_replicas')}")
            if method == self.fails:
                raise OSError("a replica is gone")
            return {"sync": 1.0} if method == "update_weights" else {}

        return call


def trainer(option: str, base: Path, log: list[str]) -> Any:
    """A trainer of `+relex=<option>` after step 4; nothing of verl below its hooks is started."""
    model = [f"actor_rollout_ref.model.path={base}", "algorithm.adv_estimator=grpo"]
    model += ["trainer.v1.colocate_async.num_warmup_batches=0", "trainer.v1.separate_async.num_warmup_batches=0"]
    config = composed(*model, *(SEPARATE if option == "separate_async" else []), relex=option)
    host: Any = get_trainer_cls(config.trainer.v1.trainer_mode)(config)

    def substitute(weights: Any) -> None:
        log.append(f"send {weights if weights is None or isinstance(weights, str) else weights.folder_name}")

    host.relex = SimpleNamespace(
        substitute=substitute, on_save=lambda step: log.append(f"on_save {step}"), wants_scores=False
    )
    host.relex.validated = []
    host.relex.on_validated = lambda step, metrics, core: host.relex.validated.append((step, metrics, core()))
    host.global_steps, host.total_training_steps = 4, 20
    host.checkpoint_manager = Replicas("", log)
    host.standalone_checkpoint_manager = Replicas("standalone ", log)
    host.val_dataset = [{"data_source": "sums"}]
    host.val_dataloader = [{"raw_prompt": [[{"role": "user", "content": "1+1="}]]}]
    host.current_mode = HybridEngineMode.TRAINER
    host.timing_raw = {}
    host.prev_step_profile = False
    host.add_replicas_to_balancer = host.remove_replicas_from_balancer = lambda: None
    return host
