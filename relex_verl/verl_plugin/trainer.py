"""verl's three trainers with RELEX's hooks. They lend what only a trainer has; the callback makes the decisions."""

import time
from collections.abc import Collection
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode
from verl.utils.debug import marked_timer

from relex_verl.run.callback import RelexCallback
from relex_verl.run.protocol import Weights
from relex_verl.run.validation import Validation
from relex_verl.verl_plugin import leftovers
from relex_verl.verl_plugin.probe import Probe, core_metric, deadline, same_random_state
from relex_verl.verl_plugin.rollout_calls import RolloutCalls
from relex_verl.verl_plugin.rows import WatchedRows
from relex_verl.verl_plugin.settings import checked_config, run_facts
from relex_verl.verl_plugin.worker import RelexActorWorker, RelexDetachActorWorker

__all__ = ["RelexColocateAsync", "RelexSeparateAsync", "RelexSync"]

# What a given-up validation leaves is waited for so long: after its requests were aborted only rewards and further turns
# of conversations are under way. verl's own validation waits, too, and training with it.
SETTLE_SECONDS = 60.0
REWARD = "critic/score/mean"  # verl's, before any penalty


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
    steps_per_epoch: int
    role_worker_mapping: dict[Role, Any]
    config: DictConfig
    logger: Any
    timing_raw: dict[str, float]
    actor_rollout_wg: Any
    checkpoint_manager: Any
    replay_buffer: Any
    val_dataset: Any
    val_dataloader: Any

    def __init__(self, config: DictConfig) -> None:
        self.relex = RelexCallback(checked_config(config), run_facts(config))
        self._relex_call = RolloutCalls(self.relex.config.rollout_timeout_s)
        self._relex_probe: Probe | None = None
        self._relex_lost: set[str] = set()  # prompts of given-up validations that were waited for in vain
        self.relex_rewards: dict[int, float] = {}
        self._relex_resting = False  # the rollout sleeps while the engine computes
        self._relex_saved_step = 0  # step of the last checkpoint, this run's or the one that it resumed from
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.verl_mode
        super().__init__(config)  # type: ignore[call-arg]

    # Hooks

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        # verl trains to the end of its epochs, however many steps it was given.
        by_epochs = self.steps_per_epoch * self.config.trainer.total_epochs
        self.relex.on_length_known(min(self.total_training_steps, by_epochs))

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()  # type: ignore[misc]
        for role in (Role.Actor, Role.ActorRollout, Role.ActorRolloutRef):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(self.actor_worker)

    def _load_checkpoint(self) -> None:
        # The only moment at which the weights are theta_0: the model is built, no checkpoint is loaded yet.
        self.relex.on_model_ready(self.actor_rollout_wg)
        super()._load_checkpoint()  # type: ignore[misc]
        self._relex_saved_step = self.global_steps
        self.relex.on_checkpoint_loaded(self.global_steps)

    def on_train_begin(self) -> None:
        """A run that ended between a cut and its scores is scored before it trains on."""
        if self.relex.wants_scores:
            self.global_steps -= 1  # verl has counted on to the step that it is about to train
            try:
                scored = self.relex.on_train_begin(self.global_steps, self, self.logger)
                self.logger.log(data=scored, step=self.global_steps)
            finally:
                self.global_steps += 1
        super().on_train_begin()  # type: ignore[misc]

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

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._compute_metrics(batch, metrics, *args, **kwargs)  # type: ignore[misc]
        if REWARD in metrics:
            self.relex_rewards[self.global_steps] = float(metrics[REWARD])

    def _save_checkpoint(self) -> None:
        self.relex.on_save(self.global_steps)
        super()._save_checkpoint()  # type: ignore[misc]
        self._relex_saved_step = self.global_steps

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train. verl calls its own `on_train_end` only when a run does not end with its last step."""
        try:
            super().fit(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self.relex.on_train_end(whole=False)
            raise
        self.relex.on_train_end()

    # What a validation of other weights needs

    def relex_validate(
        self, weights: Weights, metric: str | None, timeout: float, places: Collection[int] | None = None
    ) -> Validation:
        """verl's validation of other weights than the actor's. The rollout keeps them until `relex_restore`.

        Args:
            weights: a prediction, or "observed" for the actor's own along the same path.
            metric: the metric that is decided on, None for verl's core metric of the first data source.
            timeout: seconds.
            places: of the rows of the validation set to ask for; None for all.

        Raises:
            ValidationTimeout, ValueError: it hung, or there was nothing to validate on.
            RolloutSilent: the rollout is gone.
        """
        if not len(self.val_dataset):
            raise ValueError("the validation set is empty")
        start, loader = time.perf_counter(), self.val_dataloader
        with same_random_state(loader), deadline(self.replay_buffer, timeout) as check:
            leftovers.drain(check)
            self._relex_probe = probe = Probe(self._relex_source())
            self.val_dataloader = rows = WatchedRows(loader, places)
            try:
                self.relex.substitute(weights)
                self._relex_call("falling asleep", self._relex_sleep)
                self._relex_call("taking weights", self._relex_wake)
                # separate_async loads its hybrid replicas here.
                self._relex_call("the start of a validation", self.on_validate_begin)  # type: ignore[attr-defined]
                # Substituted until the end: with a reward model on the same devices verl sends the weights again in between.
                metrics = self._validate()
                self._relex_call("the end of a validation", self.on_validate_end)  # type: ignore[attr-defined]
            finally:
                self._relex_probe, self.val_dataloader = None, loader
                if self._relex_call.silent is None:  # else the ranks may be waiting in the update that was given up
                    self.relex.substitute(None)
        probe.marks, probe.places = rows.marks(), rows.places
        return probe.validation(metrics, metric, time.perf_counter() - start)

    def relex_rest(self) -> None:
        """Put the rollout to sleep, so that the engine may compute; `relex_restore` wakes it."""
        self._relex_call("falling asleep", self._relex_sleep)
        self._relex_resting = True

    def relex_restore(self) -> None:
        """Give the rollout the actor's weights back, whatever a validation left behind."""
        if self._relex_call.silent is None:
            self.relex.substitute(None)
        if not self._relex_resting:
            self._relex_call("falling asleep", self._relex_sleep)
        self._relex_resting = False
        leftovers.clear_settled()
        self._relex_call("taking weights", self._relex_wake)

    def relex_end_training(self) -> None:
        """End the run after this step, properly: with a checkpoint of it, which verl may have saved already."""
        self.total_training_steps = self.global_steps  # first: the run ends even if the checkpoint fails
        if self._relex_saved_step == self.global_steps:
            return
        # As when verl saves: the rollout's weights and cache off the device.
        self._relex_call("falling asleep", self._relex_sleep)
        try:
            self._save_checkpoint()
        finally:
            self._relex_call("taking weights", self._relex_wake)  # verl may validate this step

    def _validate(self) -> dict[str, float]:
        # verl's own, too: it takes as many answers as it has asked for, whoever asked.
        self._relex_lost = leftovers.settle(SETTLE_SECONDS, self._relex_lost)
        with leftovers.left_out(self.replay_buffer, self._relex_lost):
            metrics: dict[str, float] = super()._validate()  # type: ignore[misc]
        if self._relex_probe is None:  # the policy's own weights
            self.relex.on_validated(self.global_steps, metrics, lambda: core_metric(metrics, self._relex_source()))
        return metrics

    def _maybe_log_val_generations(self, inputs: list[str], outputs: list[str], scores: list[float]) -> None:
        if self._relex_probe is None:
            super()._maybe_log_val_generations(inputs=inputs, outputs=outputs, scores=scores)  # type: ignore[misc]
        else:
            self._relex_probe.inputs = list(inputs)

    def _dump_generations(self, *args: Any, **kwargs: Any) -> None:
        # verl names the file by the step: a candidate's would replace the run's own.
        if self._relex_probe is None:
            super()._dump_generations(*args, **kwargs)  # type: ignore[misc]

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, infos: Any, sample_turns: Any, expected_acc_counts: Any = None
    ) -> Any:
        if self._relex_probe is not None:
            self._relex_probe.see(data_sources, sample_uids, infos, expected_acc_counts)
        return super()._val_metrics_update(  # type: ignore[misc]
            data_sources, sample_uids, infos, sample_turns, expected_acc_counts=expected_acc_counts
        )

    def _relex_source(self) -> str:
        return str(self.val_dataset[0].get("data_source", "unknown")) if len(self.val_dataset) else ""

    def _relex_sleep(self) -> None:
        """Abort what the rollout generates and put it to sleep, as verl does before it trains with partial rollouts."""
        self.checkpoint_manager.abort_replicas()
        self.checkpoint_manager.sleep_replicas()

    def _relex_wake(self) -> None:
        """Bring what the actor exports to the sleeping rollout, the way this mode does after a step."""
        self.checkpoint_manager.update_weights(self.global_steps)
        self.checkpoint_manager.resume_generation_replicas()


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
    """`+relex=separate_async`: stand-alone replicas, and hybrid ones that verl lends between training and rollout."""

    verl_mode = "separate_async"
    actor_worker = RelexDetachActorWorker
    _relex_mode_before: HybridEngineMode | None = None

    def relex_validate(
        self, weights: Weights, metric: str | None, timeout: float, places: Collection[int] | None = None
    ) -> Validation:
        """As in the other modes; remembers whether the hybrid replicas were generating before the first."""
        if self._relex_mode_before is None:
            self._relex_mode_before = self.current_mode
        return super().relex_validate(weights, metric, timeout, places)

    def relex_restore(self) -> None:
        """As in the other modes; the hybrid replicas go back to what they did before the scoring."""
        super().relex_restore()
        before, self._relex_mode_before = self._relex_mode_before, None
        if before == HybridEngineMode.ROLLOUT:
            self.switch_to_rollout()

    def switch_to_rollout(self, **kwargs: Any) -> None:
        """verl's; replicas that are awake by half count as awake, so that `switch_to_trainer` puts them to sleep."""
        try:
            super().switch_to_rollout(**kwargs)
        except BaseException:
            self.current_mode = HybridEngineMode.ROLLOUT
            raise

    def _relex_sleep(self) -> None:
        if self.current_mode == HybridEngineMode.ROLLOUT:
            self.switch_to_trainer()
        self.standalone_checkpoint_manager.abort_replicas()

    def _relex_wake(self) -> None:
        self.standalone_checkpoint_manager.update_weights(self.global_steps)  # resumes generation, too
