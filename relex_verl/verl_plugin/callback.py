"""The driver's side: when to observe, when to cut, what to write, and what to do when something goes wrong."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from relex_verl import tracking
from relex_verl.advice import Advice, unscored
from relex_verl.config import ConfigError, Plan, RelexConfig
from relex_verl.hf_checkpoint import write_json
from relex_verl.prediction import Prediction
from relex_verl.report import horizon_figure, write_html
from relex_verl.trajectory import TrajectoryError
from relex_verl.verl_plugin.cut import Host, Verdict, decide
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
    """Follows one run. verl's trainer calls `on_...` and `substitute`; everything else is private.

    Attributes:
        config: the checked `relex` node.
        active: whether RELEX still has something to do; False after the last cut, or after an error.
    """

    def __init__(self, config: DictConfig) -> None:
        """Check the configuration.

        Raises:
            ConfigError: a value that cannot work.
        """
        self.config: RelexConfig = checked_config(config)
        self.active = True
        self._verl = config
        self._workers: Any = None
        self._plan: Plan | None = None
        self._first_cut = 0
        self._total_steps = 0
        self._trajectory = self.config.trajectory
        self._window: dict[str, Any] | None = None  # of a cut whose predictions are still to be scored
        self._log: Any = None
        self._earlier: list[dict[str, Any]] = []

    @property
    def plan(self) -> Plan:
        """The coming cut; known once the length of the run is."""
        assert self._plan is not None
        return self._plan

    @property
    def wants_scores(self) -> bool:
        """Whether a cut is waiting for the rollout to be ready."""
        return self.active and self._window is not None

    def on_length_known(self, total_steps: int) -> None:
        """Resolve cut and targets; called before any worker starts.

        Raises:
            ConfigError: they do not fit the run.
        """
        self._total_steps = total_steps
        self._plan = self.config.plan(total_steps)
        self._first_cut = self.plan.t_cut

    def on_model_ready(self, workers: Any) -> None:
        """Take theta_0, after the model is built and before a checkpoint is loaded.

        Raises:
            RuntimeError, ValueError: the run is refused (memory, disk, an engine whose weights cannot be followed).
        """
        self._workers = workers
        trainer = self._verl.trainer
        setup = Setup(
            output_dir=self.config.folder,
            base_model=str(self._verl.actor_rollout_ref.model.path),
            run={"project": trainer.project_name, "experiment": trainer.experiment_name},
            trajectory=self.config.trajectory,
            quantization=self.config.quantization,
            rows={kind: self.config.plan(self._total_steps, kind).rows for kind in ("fp32", "bf16")},
            predictions=len(self._predictions()) + 1,  # the search may find one that is not a target
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
        while self._plan is not None and step >= self.plan.t_cut:
            logger.info("RELEX: training resumes at step %d, the cut at %d is behind it", step, self.plan.t_cut)
            self._plan = self._next_plan()
        if self._plan is None:
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
        if not self.active or not self.plan.observes(step):
            return {}
        self._log = log
        return self._guard(lambda: self._observe(step)) or {}

    def on_rollout_ready(self, step: int, host: Host) -> dict[str, float]:
        """Score the predictions of a cut and act on the advice; called when the rollout holds the step's weights.

        Args:
            step: the training step just done.
            host: the trainer.

        Returns:
            Metrics of the validations.
        """
        window, self._window = self._window, None
        assert window is not None
        try:
            verdict = decide(host, self.config, self.plan, window)
        finally:
            # Outside the guard: a rollout that keeps a prediction's weights would sample the next step from them.
            host.relex_restore()
        self._guard(lambda: self._conclude(step, window, verdict, host))
        return verdict.metrics()

    def on_train_end(self) -> None:
        """The run is over, by whatever way."""
        if self.active and self._plan is not None:
            logger.warning("RELEX: training ended before the cut at step %d; the trajectory is kept", self.plan.t_cut)
        self.active = False

    def substitute(self, weights: Prediction | str | None) -> None:
        """Have verl's next weight update send other weights; None ends it. Raises RelexError."""
        self._ask("relex_substitute", weights)

    # Start

    def _start(self, setup: Setup) -> None:
        self._trajectory, reason = self._ask("relex_start", setup, refuse=True)
        if reason is not None:
            logger.warning(
                "RELEX: relex.trajectory=%s becomes %s: %s", self.config.trajectory, self._trajectory, reason
            )
        self._plan = self.config.plan(self._total_steps, self._trajectory)

    def _open(self, step: int) -> None:
        held = self._ask("relex_open", step, refuse=True)
        folder = self.config.folder
        if not (folder / "trajectory" / "index.json").exists():
            raise _Refused(
                TrajectoryError(f"the driver does not see relex.output_dir={folder}: use a shared file system")
            )
        if held:
            logger.info("RELEX: goes on after step %d, with %d observed steps", step, len(held))
        elif step:
            logger.warning("RELEX: observes from step %d on; the steps before were trained without it", step)

    def _refuse_foreign_folder(self, step: int) -> None:
        """A fresh run does not take over what is there, unless verl itself was told to resume and found nothing."""
        index = self.config.folder / "trajectory" / "index.json"
        if step == 0 and index.exists() and self._verl.trainer.resume_mode == "disable":
            cure = (
                "holds the trajectory of another run (trainer.resume_mode=disable starts a new one): give this run its "
                "own relex.output_dir, or remove that folder"
            )
            raise ConfigError("relex.output_dir", str(self.config.folder), cure)

    # One observed step, and the cut

    def _observe(self, step: int) -> dict[str, float]:
        metrics: dict[str, float] = self._ask("relex_observe", step)
        if step == self.plan.t_cut:
            window = self._fit()
            if self.config.validate_targets:
                self._window = window
            else:
                self._conclude(step, window, Verdict(unscored("relex.validate_targets=false")), None)
        return metrics

    def _fit(self) -> dict[str, Any]:
        """Fit, and write the configured targets before anything is scored: whatever comes, they are there."""
        window: dict[str, Any] = self._ask("relex_fit", self.config.methods, self.plan.targets)
        predictions = self._predictions()
        for i, prediction in enumerate(predictions, 1):
            logger.info("RELEX: writing %s (%d of %d)", prediction.folder_name, i, len(predictions))
            self._write(prediction, window["steps"])
        return window

    def _write(self, prediction: Prediction, steps: list[int]) -> None:
        base_model, trajectory = str(self._verl.actor_rollout_ref.model.path), self.config.folder / "trajectory"
        provenance = tracking.provenance(base_model, prediction, self.plan.t_cut, steps, trajectory)
        self._ask("relex_write", prediction, self._folder(prediction), provenance)

    def _conclude(self, step: int, window: dict[str, Any], verdict: Verdict, host: Host | None) -> None:
        """Tell the user in every place, and act: stop, go on to the next cut, or let go."""
        winner = verdict.winner
        if winner is not None:
            if winner not in self._predictions():
                self._write(winner, window["steps"])
            recommend(self._folder(winner), self.config.folder / "recommended")
        report = self._report(step, window, verdict)
        figures = dict(window["figures"])
        if verdict.hold is not None:
            scored = [(one.method, one.target, validation.score) for one, validation in verdict.scored]
            hold = (step, verdict.hold.score)
            figures["scores"] = horizon_figure(self.config.folder / "figures", scored, hold, len(verdict.hold.prompts))
        verdict.keep_scores(self.config.folder / "scores", step)
        write_json(self.config.folder / "report.json", report)
        write_html(self.config.folder / "report.html", report, figures)
        logger.info("RELEX: %s Report: %s", verdict.advice.reason, self.config.folder / "report.html")
        if "wandb" in self._log.logger:
            folders = [Path(prediction["path"]) for prediction in report["predictions"]]
            tracking.log_to_wandb(self._log.logger["wandb"], step, report, figures, folders)
        self._earlier.append({"t_cut": step, **report["advice"]})
        self._act(verdict.advice, host)

    def _act(self, advice: Advice, host: Host | None) -> None:
        if advice.action == "stop" and self.config.on_cut == "stop" and host is not None:
            logger.info("RELEX: the run ends here, as relex.on_cut=stop says")
            host.relex_end_training()
        following = self._next_plan() if advice.action == "keep_training" else None
        if following is None:
            self._close()
            return
        try:
            self._ask("relex_room", following.rows_from(self.plan.t_cut + 1))
        except RelexError as error:
            logger.warning("RELEX: observes no further, the rows up to step %d do not fit: %s", following.t_cut, error)
            self._close()
            return
        self._plan = following
        logger.info("RELEX: observes on; the next cut is at step %d", following.t_cut)

    def _next_plan(self) -> Plan | None:
        return self.config.next_plan(self.plan, self._first_cut, self._total_steps, self._trajectory)

    def _predictions(self) -> list[Prediction]:
        rank, fit_from = self.config.rank, self.config.fit_from
        return [
            Prediction(method, target, rank, fit_from) for method in self.config.methods for target in self.plan.targets
        ]

    def _folder(self, prediction: Prediction) -> Path:
        return self.config.folder / "predicted" / prediction.folder_name

    def _report(self, step: int, window: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
        predictions = self._predictions()
        if verdict.winner is not None and verdict.winner not in predictions:
            predictions.append(verdict.winner)
        won = verdict.winner is not None
        return {
            "t_cut": step,
            "observed_steps": window["steps"],
            "predictions": [
                {"path": str(self._folder(one)), **json.loads((self._folder(one) / "relex.json").read_text())}
                for one in predictions
            ],
            "fits": window["fits"],
            "backtests": window["backtests"],
            "screened_out": verdict.screened_out,
            "validation_scores": verdict.rows(step),
            "advice": asdict(verdict.advice),
            "recommended_path": str(self.config.folder / "recommended") if won else None,
            "steps_saved": max(self._total_steps, verdict.winner.target) - step if verdict.winner is not None else 0,
            "earlier_cuts": self._earlier,
            "versions": tracking.versions(),
        }

    # Ranks and errors

    def _ask(self, method: str, *args: Any, refuse: bool = False) -> Any:
        """Call all ranks; rank 0's value, or the error of the rank that failed first-hand."""
        answers: list[Answer] = getattr(self._workers, method)(*args)
        failed = [(answer.peer, rank, answer) for rank, answer in enumerate(answers) if answer.error is not None]
        if failed:
            _, rank, answer = min(failed, key=lambda one: one[:2])
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
            self._window = None
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


class _Refused(Exception):
    """Carries a refusal past `_guard`."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def recommend(prediction: Path, recommended: Path) -> None:
    """Put a predicted checkpoint at `recommended`, whole or not at all; files are linked where the file system can."""
    partial = recommended.with_name(f".{recommended.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(prediction, partial, copy_function=_link_or_copy)
    shutil.rmtree(recommended, ignore_errors=True)
    partial.rename(recommended)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
