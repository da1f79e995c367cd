"""verl's three trainers with RELEX's hooks. They lend what only a trainer has; the callback makes the decisions."""

import time
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.utils.debug import marked_timer

from relex_verl.prediction import Prediction
from relex_verl.verl_plugin.callback import RelexCallback
from relex_verl.verl_plugin.scoring import Probe, Validation, deadline, same_random_state
from relex_verl.verl_plugin.worker import RelexActorWorker, RelexDetachActorWorker

__all__ = ["RelexColocateAsync", "RelexSeparateAsync", "RelexSync"]

DRAIN_POLL_SECONDS = 0.2


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
    config: DictConfig
    logger: Any
    timing_raw: dict[str, float]
    actor_rollout_wg: Any
    checkpoint_manager: Any

    def __init__(self, config: DictConfig) -> None:
        self.relex = RelexCallback(config)
        self._relex_probe: Probe | None = None
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.verl_mode
        super().__init__(config)  # type: ignore[call-arg]

    # Hooks

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
        self.relex.on_model_ready(self.actor_rollout_wg)
        super()._load_checkpoint()  # type: ignore[misc]
        self.relex.on_checkpoint_loaded(self.global_steps)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        """One training step, then the row of the trajectory that it made."""
        batch = super().step(metrics, timing_raw)  # type: ignore[misc]
        if self.relex.active:
            with marked_timer("relex", timing_raw):
                metrics.update(self.relex.on_step_end(self.global_steps, self.logger))
        return batch

    def on_step_end(self) -> None:
        """verl brings the new weights to the rollout; after a cut the predictions are scored there."""
        super().on_step_end()  # type: ignore[misc]
        if self.relex.wants_scores:
            with marked_timer("relex_validation", self.timing_raw):
                scored = self.relex.on_rollout_ready(self.global_steps, self)
            # verl merges these into the step's metrics; separate_async has just assigned its own.
            self._pending_sync_metrics = {**(getattr(self, "_pending_sync_metrics", None) or {}), **scored}

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train. verl calls its own `on_train_end` only when a run does not end with its last step."""
        try:
            super().fit(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.relex.on_train_end()

    # What a validation of other weights needs

    def relex_validate(self, weights: Prediction | str, metric: str | None, timeout: float) -> Validation:
        """verl's validation of other weights than the actor's. The rollout keeps them until `relex_restore`.

        Args:
            weights: a prediction, or "observed" for the actor's own along the same path.
            metric: the metric that is decided on, None for verl's core metric.
            timeout: seconds.

        Raises:
            ValidationTimeout, ValueError: it hung, or there was nothing to validate on.
        """
        start = time.perf_counter()
        with same_random_state(), deadline(timeout):
            self._relex_drain()
            self.relex.substitute(weights)
            try:
                self._relex_publish()
                self.on_validate_begin()  # type: ignore[attr-defined]  # separate_async loads its hybrid replicas here
            finally:
                self.relex.substitute(None)
            self._relex_probe = probe = Probe()
            try:
                metrics = self._validate()  # type: ignore[attr-defined]
                self.on_validate_end()  # type: ignore[attr-defined]
            finally:
                self._relex_probe = None
        return probe.validation(metrics, metric, time.perf_counter() - start)

    def relex_restore(self) -> None:
        """Give the rollout the actor's weights back; drop what an unfinished validation left behind."""
        left = (tq.kv_list("val") or {}).get("val", {})
        if left:
            tq.kv_clear(keys=list(left), partition_id="val")
        self._relex_publish()

    def relex_end_training(self) -> None:
        """End the run after this step, properly: with a checkpoint of it, if the run saves any."""
        frequency = self.config.trainer.save_freq
        if frequency > 0 and self.global_steps % frequency:
            self._save_checkpoint()  # type: ignore[attr-defined]
        self.total_training_steps = self.global_steps

    def _maybe_log_val_generations(self, inputs: list[str], outputs: list[str], scores: list[float]) -> None:
        if self._relex_probe is None:
            super()._maybe_log_val_generations(inputs=inputs, outputs=outputs, scores=scores)  # type: ignore[misc]
        else:
            self._relex_probe.inputs = list(inputs)

    def _dump_generations(self, *args: Any, **kwargs: Any) -> None:
        # verl names the file by the step: a candidate's would replace the run's own.
        if self._relex_probe is None:
            super()._dump_generations(*args, **kwargs)  # type: ignore[misc]

    def _val_metrics_update(self, data_sources: Any, sample_uids: Any, infos: Any, *args: Any, **kwargs: Any) -> Any:
        if self._relex_probe is not None:
            self._relex_probe.sources = [str(source) for source in data_sources]
            self._relex_probe.values = {name: list(values) for name, values in infos.items()}
        return super()._val_metrics_update(data_sources, sample_uids, infos, *args, **kwargs)  # type: ignore[misc]

    def _relex_drain(self) -> None:
        """Wait until no training prompt is being generated: none may be answered by other weights than the policy's."""
        while True:
            tags = (tq.kv_list("train") or {}).get("train", {}).values()
            if not any(tag.get("is_prompt") and tag.get("status") in ("pending", "running") for tag in tags):
                return
            time.sleep(DRAIN_POLL_SECONDS)

    def _relex_publish(self) -> None:
        """Bring what the actor exports to the rollout, the way this mode does after a step."""
        raise NotImplementedError


@register_trainer("relex_sync")
class RelexSync(_RelexTrainerMixin, PPOTrainerSync):
    """`+relex=default`."""

    verl_mode = "sync"
    actor_worker = RelexActorWorker

    def _relex_publish(self) -> None:
        self.checkpoint_manager.sleep_replicas()
        self.checkpoint_manager.update_weights(self.global_steps)


@register_trainer("relex_colocate_async")
class RelexColocateAsync(_RelexTrainerMixin, PPOTrainerColocateAsync):
    """`+relex=colocate_async`."""

    verl_mode = "colocate_async"
    actor_worker = RelexActorWorker

    def _relex_publish(self) -> None:
        self.checkpoint_manager.abort_replicas()
        self.checkpoint_manager.sleep_replicas()
        self.checkpoint_manager.update_weights(self.global_steps)
        self.checkpoint_manager.resume_generation_replicas()


@register_trainer("relex_separate_async")
class RelexSeparateAsync(_RelexTrainerMixin, PPOTrainerSeparateAsync):
    """`+relex=separate_async`."""

    verl_mode = "separate_async"
    actor_worker = RelexDetachActorWorker

    def _relex_publish(self) -> None:
        from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode

        if self.current_mode == HybridEngineMode.ROLLOUT:
            self.switch_to_trainer()
        self.standalone_checkpoint_manager.update_weights(self.global_steps)
