"""verl's three trainers with RELEX's hooks. They only call the callback; it makes the decisions."""

from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.utils.debug import marked_timer

from relex_verl.verl_plugin.callback import RelexCallback
from relex_verl.verl_plugin.worker import RelexActorWorker, RelexDetachActorWorker

__all__ = ["RelexColocateAsync", "RelexSeparateAsync", "RelexSync"]


class _RelexTrainerMixin:
    """Hooks common to the modes; stands before verl's trainer in the bases.

    Attributes:
        verl_mode: the mode that verl's own code branches on.
        actor_worker: the observed worker class of that mode.
    """

    verl_mode: str
    actor_worker: type
    global_steps: int
    total_training_steps: int
    role_worker_mapping: dict[Role, Any]

    def __init__(self, config: DictConfig) -> None:
        self.relex = RelexCallback(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.verl_mode
        super().__init__(config)  # type: ignore[call-arg]

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        self.relex.on_length_known(self.total_training_steps)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()  # type: ignore[misc]
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.actor_worker)

    def _load_checkpoint(self) -> None:
        # The only moment at which the weights are theta_0: the model is built, no checkpoint is loaded yet.
        self.relex.on_model_ready(self.actor_rollout_wg)  # type: ignore[attr-defined]
        super()._load_checkpoint()  # type: ignore[misc]
        self.relex.on_checkpoint_loaded(self.global_steps)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """One training step, then the row of the trajectory that it made."""
        batch = super().step(metrics, timing_raw)  # type: ignore[misc]
        if self.relex.active:
            with marked_timer("relex", timing_raw):
                metrics.update(self.relex.on_step_end(self.global_steps, self.logger))  # type: ignore[attr-defined]
        return batch

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train. verl calls its own `on_train_end` only when a run does not end with its last step."""
        try:
            super().fit(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.relex.on_train_end()


@register_trainer("relex_sync")
class RelexSync(_RelexTrainerMixin, PPOTrainerSync):
    """`+relex=default`."""

    verl_mode = "sync"
    actor_worker = RelexActorWorker


@register_trainer("relex_colocate_async")
class RelexColocateAsync(_RelexTrainerMixin, PPOTrainerColocateAsync):
    """`+relex=colocate_async`."""

    verl_mode = "colocate_async"
    actor_worker = RelexActorWorker


@register_trainer("relex_separate_async")
class RelexSeparateAsync(_RelexTrainerMixin, PPOTrainerSeparateAsync):
    """`+relex=separate_async`."""

    verl_mode = "separate_async"
    actor_worker = RelexDetachActorWorker
