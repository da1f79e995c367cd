"""The driver's side: when to observe, when to cut, what to write, and what to do when something goes wrong."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from relex_verl import tracking
from relex_verl.advice import advise
from relex_verl.config import ConfigError, Plan, RelexConfig
from relex_verl.hf_checkpoint import write_json
from relex_verl.observer import Prediction
from relex_verl.trajectory import TrajectoryError
from relex_verl.verl_plugin.early_check import checked_config
from relex_verl.verl_plugin.worker import Answer, Setup

__all__ = ["RelexCallback", "RelexError"]

logger = logging.getLogger("relex_verl")
logger.setLevel(os.environ.get("RELEX_LOGGING_LEVEL", "INFO"))

# What a rank finds wrong with the request itself. Raised before the first step whatever `relex.on_error` says: nothing has
# been trained yet, and a run that silently goes on without what was asked for is the worse loss.
REFUSALS = {
    "BudgetError": RuntimeError,
    "ConfigError": ValueError,
    "TrajectoryError": TrajectoryError,
    "ValueError": ValueError,
}


class RelexError(RuntimeError):
    """A rank failed inside RELEX; the message holds its traceback."""


class RelexCallback:
    """Follows one run. verl's trainer calls `on_...`; everything else is private.

    Attributes:
        config: the checked `relex` node.
        active: whether RELEX still has something to do; False after the cut, or after an error.
    """

    def __init__(self, config: DictConfig) -> None:
        """Check the configuration.

        Raises:
            ConfigError: a value that cannot work.
        """
        self.config: RelexConfig = checked_config(config)
        self.active = True
        self.plan: Plan | None = None
        self._verl = config
        self._workers: Any = None

    def on_length_known(self, total_steps: int) -> None:
        """Resolve cut and targets; called before any worker starts.

        Raises:
            ConfigError: they do not fit the run.
        """
        self._total_steps = total_steps
        self.plan = self.config.plan(total_steps)

    def on_model_ready(self, workers: Any) -> None:
        """Take theta_0, after the model is built and before a checkpoint is loaded.

        Raises:
            RuntimeError, ValueError: the run is refused (memory, disk, an engine whose weights cannot be followed).
        """
        assert self.plan is not None
        self._workers = workers
        setup = Setup(
            output_dir=self.config.folder,
            base_model=str(self._verl.actor_rollout_ref.model.path),
            run={"project": self._verl.trainer.project_name, "experiment": self._verl.trainer.experiment_name},
            trajectory=self.config.trajectory,
            quantization=self.config.quantization,
            rows={kind: self.config.plan(self._total_steps, kind).rows for kind in ("fp32", "bf16")},
            predictions=len(self._predictions()),
            rank=self.config.rank,
            fit_from=self.config.fit_from,
        )
        self._guard(lambda: self._start(setup))

    def on_checkpoint_loaded(self, step: int) -> None:
        """Open the trajectory, from the start or after the step that training resumes from.

        Raises:
            TrajectoryError: the output folder belongs to another run.
        """
        if not self.active:
            return
        assert self.plan is not None
        if step >= self.plan.t_cut:
            logger.info("RELEX: training resumes at step %d, the cut at %d is behind it", step, self.plan.t_cut)
            self._close()
            return
        self._refuse_foreign_folder(step)
        self._guard(lambda: self._open(step))

    def on_step_end(self, step: int, log: Any) -> dict[str, float]:
        """Observe, and at the cut fit and write; called after the actor update, before the checkpoint is saved.

        Args:
            step: the training step just done.
            log: verl's `Tracking`.

        Returns:
            Metrics to add to the step's own; empty when there is nothing to do.
        """
        if not self.active or self.plan is None or not self.plan.observes(step):
            return {}
        return self._guard(lambda: self._observe(step, log)) or {}

    def on_train_end(self) -> None:
        """The run is over, by whatever way."""
        if self.active and self.plan is not None:
            logger.warning("RELEX: training ended before the cut at step %d; the trajectory is kept", self.plan.t_cut)
        self.active = False

    # One observed step

    def _start(self, setup: Setup) -> None:
        kind, reason = self._ask("relex_start", setup, refuse=True)
        if reason is not None:
            logger.warning("RELEX: relex.trajectory=%s becomes %s, since %s", self.config.trajectory, kind, reason)
        self.plan = self.config.plan(self._total_steps, kind)

    def _open(self, step: int) -> None:
        held = self._ask("relex_open", step, refuse=True)
        if not (self.config.folder / "trajectory" / "index.json").exists():
            raise TrajectoryError(
                f"the driver does not see relex.output_dir={self.config.folder}: use a shared file system"
            )
        if held:
            logger.info("RELEX: goes on after step %d, with %d observed steps", step, len(held))
        elif step:
            logger.warning("RELEX: observes from step %d on; the steps before were trained without it", step)

    def _observe(self, step: int, log: Any) -> dict[str, float]:
        assert self.plan is not None
        metrics = self._ask("relex_observe", step)
        if step == self.plan.t_cut:
            self._cut(step, log)
            self._close()
        return metrics

    def _cut(self, step: int, log: Any) -> None:
        answer = self._ask("relex_fit")
        written = []
        for i, prediction in enumerate(self._predictions(), 1):
            logger.info("RELEX: writing %s (%d of %d)", prediction.folder_name, i, len(self._predictions()))
            folder = self.config.folder / "predicted" / prediction.folder_name
            provenance = self._provenance(prediction, answer["steps"])
            self._ask("relex_write", prediction, folder, provenance)
            written.append((folder, provenance))
        advice = advise([folder.name for folder, _ in written], step)
        write_json(self.config.folder / "report.json", self._report(answer, written, asdict(advice)))
        logger.info("RELEX: cut at step %d. %s Report: %s", step, advice.reason, self.config.folder / "report.json")
        if "wandb" in log.logger:
            tracking.log_to_wandb(log.logger["wandb"], step, answer["fits"], written)

    def _predictions(self) -> list[Prediction]:
        assert self.plan is not None
        return [
            Prediction(method, target, self.config.rank)
            for method in self.config.methods
            for target in self.plan.targets
        ]

    def _provenance(self, prediction: Prediction, steps: list[int]) -> dict[str, Any]:
        assert self.plan is not None
        return tracking.provenance(
            str(self._verl.actor_rollout_ref.model.path),
            prediction,
            self.plan.t_cut,
            steps,
            self.config.folder / "trajectory",
        )

    def _report(
        self, answer: dict[str, Any], written: list[tuple[Path, dict[str, Any]]], advice: dict[str, Any]
    ) -> dict[str, Any]:
        assert self.plan is not None
        return {
            "t_cut": self.plan.t_cut,
            "observed_steps": answer["steps"],
            "predictions": [{"path": str(folder), **content} for folder, content in written],
            "fits": answer["fits"],
            "validation_scores": [],
            "advice": advice,
            "versions": tracking.versions(),
        }

    # Ranks and errors

    def _ask(self, method: str, *args: Any, refuse: bool = False) -> Any:
        """Call all ranks; rank 0's value, or the error of the rank that failed first-hand."""
        answers: list[Answer] = getattr(self._workers, method)(*args)
        failed = sorted((a.peer, rank, a) for rank, a in enumerate(answers) if a.error is not None) if answers else []
        if failed:
            _, rank, answer = failed[0]
            if refuse and answer.kind in REFUSALS:
                raise _Refused(REFUSALS[answer.kind](str(answer.error).splitlines()[0]))
            raise RelexError(f"rank {rank}, {method}: {answer.error}")
        return answers[0].value

    def _guard(self, work: Callable[[], Any]) -> Any:
        """Run a piece of RELEX; an error switches RELEX off (or stops the run, with `relex.on_error=raise`)."""
        try:
            return work()
        except _Refused as refused:
            raise refused.reason from None
        except Exception:
            self.active = False
            if self.config.on_error == "raise":
                raise
            logger.error("RELEX failed and is switched off; the training goes on without it", exc_info=True)
            self._release()
            return None

    def _close(self) -> None:
        self.active = False
        self._release()

    def _release(self) -> None:
        try:
            self._workers.relex_stop()
        except Exception:
            logger.debug("RELEX could not release its memory", exc_info=True)

    def _refuse_foreign_folder(self, step: int) -> None:
        """A fresh run does not take over what is there, unless verl itself was told to resume and found nothing."""
        index = self.config.folder / "trajectory" / "index.json"
        if step == 0 and index.exists() and self._verl.trainer.resume_mode == "disable":
            cure = (
                "holds the trajectory of another run (trainer.resume_mode=disable starts a new one): give this run its "
                "own relex.output_dir, or remove that folder"
            )
            raise ConfigError("relex.output_dir", str(self.config.folder), cure)


class _Refused(Exception):
    """Carries a refusal past `_guard`."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason
