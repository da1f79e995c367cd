"""The driver's side: when to observe, when to cut, what to write, and what to do when something goes wrong."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from relex_verl.maths.advice import Advice, unscored
from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.resuming import appears
from relex_verl.reporting.findings import Findings
from relex_verl.reporting.provenance import Provenance
from relex_verl.run import announce
from relex_verl.run.config import ConfigError, RelexConfig
from relex_verl.run.cut import Verdict, decide, restore
from relex_verl.run.jump import carry_out, go_on_from, jumps_before
from relex_verl.run.output import OutputFolder
from relex_verl.run.overhead import Overhead
from relex_verl.run.plan import Plan
from relex_verl.run.protocol import Host, Opened, RunFacts, Setup, Started, Weights
from relex_verl.run.ranks import Ranks, RelexError
from relex_verl.run.schedule import Schedule
from relex_verl.run.scores import RunScores
from relex_verl.trajectory.index import TrajectoryError

__all__ = ["RelexCallback"]

logger = logging.getLogger("relex_verl")


class RelexCallback:
    """Follows one run. The host's trainer calls `on_...` and `substitute`; everything else is private.

    Attributes:
        config: the checked `relex` node.
        active: whether RELEX still has something to do; False after the last cut, or after an error.
    """

    def __init__(self, config: RelexConfig, run: RunFacts) -> None:
        """Nothing is read or written yet; `run` identifies the run."""
        self.config = config
        self.active = True
        self._run = run
        self._output = OutputFolder(self.config.folder)
        self._ranks, self._overhead = Ranks(None), Overhead(config.max_overhead)
        self._schedule: Schedule | None = None
        self._metrics: dict[str, float] = {}  # of the step that was observed last
        self._findings: Findings | None = None  # of a cut whose predictions are still to be scored
        self._written: dict[Path, Provenance] = {}  # folders of this cut's predictions
        self._log: Any = None
        self._scores: RunScores | None = RunScores(config, run.base_model, self._output.path)

    @property
    def schedule(self) -> Schedule:
        """The cuts; known once the length of the run is."""
        assert self._schedule is not None
        return self._schedule

    @property
    def plan(self) -> Plan:
        """The coming cut, as long as RELEX is active."""
        assert self.schedule.plan is not None
        return self.schedule.plan

    @property
    def wants_scores(self) -> bool:
        """Whether a cut waits for the rollout."""
        return self.active and self._findings is not None

    # Before the first step: what fails here refuses the run

    def on_length_known(self, total_steps: int) -> None:
        """Resolve cut and targets; called before any worker starts.

        Raises:
            ConfigError: they do not fit the run; another one that is alive writes into the output folder.
        """
        self._schedule = Schedule(self.config, total_steps, self._run.samples_a_step)
        self._output.hold()

    def on_model_ready(self, workers: Any) -> None:
        """Take theta_0, after the model is built and before a checkpoint is loaded.

        Raises:
            RuntimeError, ValueError: the run is refused (memory, disk, an engine whose weights cannot be followed).
        """
        self._ranks = Ranks(workers)
        jumps = self.config.on_cut == "jump"
        plans, recordings, written = self.schedule.plans, self.schedule.recordings, self.schedule.checkpoints
        setup = Setup(self.config, plans, written, self._output.path, self._run, recordings)
        started: Started = self._ranks.ask_or_refuse("relex_start", setup)
        if started.reason is not None and jumps:
            raise ConfigError("relex.on_cut", "jump", f"a jump sets float32 master weights, and {started.reason}")
        announce.started(self.config, started)
        self.schedule.follow(started.kind)

    def on_checkpoint_loaded(self, step: int) -> None:
        """Open the trajectory, from the start or after the step that training resumes from.

        Raises:
            ConfigError, TrajectoryError: the output folder belongs to another run.
        """
        if step:
            self.schedule.resume(step, self._output.earlier_cuts(step))
        else:
            self._output.claim({"base model": self._run.base_model, **self._run.names}, self._run.resume_mode)
        if self._scores is not None:
            self._scores.go_on_after(step)
        recording = self.schedule.plan is None and (self.schedule.recording is not None or self.config.keep_best)
        if self.schedule.plan is None and self.config.on_cut != "jump" and not recording:
            self._close()
            return
        opened: Opened = self._ranks.ask_or_refuse("relex_open", step, recording)
        if not appears(self._output.index):
            raise TrajectoryError(f"the driver sees no relex.output_dir={self._output.path}: use a shared file system")
        if opened.began and step:
            go_on_from(self._ranks, self.schedule, self._output, step)
        else:
            announce.goes_on(step, opened)
        if self.schedule.plan is None:
            self._close()
        elif step == self.plan.t_cut:
            self._cut_again(step, observed=step in opened.steps)

    def _cut_again(self, step: int, observed: bool) -> None:
        """verl saves a step between the fit and the scores; the run has ended between the two."""
        if observed:
            logger.info("RELEX: the cut at step %d has no verdict yet: fitting it again", step)
            self._findings = self._guard(self._fit)
            return
        self.schedule.skip(step)
        if self.schedule.plan is None:
            self._close()

    # While it trains

    def on_train_begin(self, step: int, host: Host, log: Any) -> dict[str, float]:
        """Score a cut that an earlier start left without a verdict, see `on_rollout_ready`; it was resumed from `step`."""
        self._log = log
        return self.on_rollout_ready(step, host)

    def on_step_end(self, step: int, log: Any) -> dict[str, float]:
        """Observe, and at the cut fit and write; called after the actor update, before the checkpoint is saved.

        Args:
            step: the training step just done.
            log: verl's `Tracking`.

        Returns:
            Metrics to add to the step's own; empty when there is nothing to do.
        """
        if not self.active:
            return {}
        self._log = log
        with self._overhead.step():
            metrics = self._guard(lambda: self._observe(step)) if self.schedule.observes(step) else {}
        if self.active and self.schedule.cuts_at(step):
            self._overhead.forget()
            self._guard(lambda: self._cut(step))
        elif self.active and not self._overhead.bearable(self.schedule):
            self._guard(self._close)
        return metrics or {}

    def on_save(self, step: int) -> None:
        """verl is about to save a checkpoint of this step: put on disk what only memory holds."""
        if self.active and (self.config.overlap or not self.schedule.kind.keeps_rows):
            self._guard(lambda: self._ranks.ask("relex_save"))

    def on_rollout_ready(self, step: int, host: Host) -> dict[str, float]:
        """Score the predictions of a cut and act on the advice; called when the rollout holds the step's weights.

        Args:
            step: the training step just done.
            host: the trainer.

        Returns:
            Metrics of the validations.

        Raises:
            RelexError: the rollout could not be given the policy's weights back.
        """
        findings, self._findings = self._findings, None
        assert findings is not None
        try:
            verdict: Verdict | None = self._guard(lambda: self._decide(step, findings, host))
        finally:
            restore(host, step)
        return {} if verdict is None else self._guard(lambda: self._conclude(step, findings, verdict, host)) or {}

    def on_validated(self, step: int, metrics: Mapping[str, float], core: Callable[[], str | None]) -> None:
        """verl has validated the policy's own weights of this step; `core` finds its core metric, where it has one."""
        if (scores := self._scores) is not None:
            self._guard(lambda: scores.add(step, metrics, core(), self._ranks))

    def on_train_end(self, whole: bool = True) -> None:
        """The run is over; where an error ended it (`whole` is False), the ranks may answer no more."""
        if self.active and whole and self.config.overlap:
            self._guard(lambda: self._ranks.ask("relex_save"))  # a row may be under way
        if self.active and self._schedule is not None:
            announce.ended(self.schedule, self._output)
        self.active = False

    def substitute(self, weights: Weights | None) -> None:
        """Have verl's next weight update send other weights; None ends it. Raises RelexError."""
        self._ranks.ask("relex_substitute", weights)

    # One observed step, and the cut

    def _observe(self, step: int) -> dict[str, float]:
        self._metrics = self._ranks.ask("relex_observe", step, self.schedule.cuts_at(step))
        return self._metrics

    def _cut(self, step: int) -> None:
        findings = self._findings = self._fit()
        if not self.config.validate_targets:
            self._findings = None
            self._conclude(step, findings, Verdict(unscored("relex.validate_targets=false")), None)

    def _fit(self) -> Findings:
        """Fit, and write the configured targets before anything is scored: whatever comes, they are there."""
        self._output.begin_cut(self.plan.t_cut)
        self._written = {}
        findings: Findings = self._ranks.ask("relex_fit", self.config.methods, self.plan.targets)
        predictions = self.schedule.predictions
        for i, prediction in enumerate(predictions, 1):
            logger.info("RELEX: writing %s (%d of %d)", prediction.folder_name, i, len(predictions))
            self._write(prediction, findings.steps)
        return findings

    def _write(self, prediction: Prediction, steps: list[int]) -> None:
        folder, trajectory = self._output.predicted(prediction), self._output.path / "trajectory"
        facts = Provenance.of(prediction, self._run.base_model, self.plan.t_cut, steps, trajectory)
        self._ranks.ask("relex_write", prediction, folder, facts.to_json())
        self._written[folder] = facts

    def _decide(self, step: int, findings: Findings, host: Host) -> Verdict:
        """Score, and jump if it comes to that: the rollout gets those weights when it gets the policy's back."""
        jumps = jumps_before(self.config, self.schedule, self._output)
        verdict = decide(host, self.config, self.plan, findings, self.schedule.alpha_share, jumps)
        if jumps is not None and not verdict.silent:  # if so, the run ends when the rollout is to get its weights back
            facts = self._output, self._written, self._metrics, self.schedule
            report = partial(announce.report, step, findings, verdict, *facts)
            carry_out(self._ranks, self.config, step, verdict, host, self._output, report)
        return verdict

    def _conclude(self, step: int, findings: Findings, verdict: Verdict, host: Host | None) -> dict[str, float]:
        """Tell the user in every place, and act: stop, go on to the next cut, or let go."""
        winner = verdict.winner if verdict.advice.action == "stop" else None
        if winner is not None and self._output.predicted(winner) not in self._written:
            self._write(winner, findings.steps)
        self._output.recommend(winner)
        report = announce.report(step, findings, verdict, self._output, self._written, self._metrics, self.schedule)
        self._output.keep(report)
        announce.show(self._output, self._log.logger, report, findings.figures, verdict)
        self.schedule.earlier.append(report.summary)
        self._act(verdict.advice, host)
        return verdict.metrics() | announce.spent(report)

    def _act(self, advice: Advice, host: Host | None) -> None:
        if advice.action == "stop" and self.config.on_cut == "stop" and host is not None:
            logger.info("RELEX: the run ends here, as relex.on_cut=stop says")
            announce.attempt("the last checkpoint", host.relex_end_training)
        following = self.schedule.after(advice)
        if following is None:
            self._close()
            return
        try:
            self._ranks.ask("relex_room", following.rows_from(self.plan.t_cut + 1))
        except RelexError as error:
            logger.warning("RELEX: observes no further, the rows up to step %d do not fit: %s", following.t_cut, error)
            self._close()
            return
        self.schedule.plan = following
        logger.info("RELEX: observes on; the next cut is at step %d", following.t_cut)

    # Errors

    def _guard(self, work: Callable[[], Any]) -> Any:
        """Run a piece of RELEX; an error switches RELEX off (or stops the run, with `relex.on_error=raise`)."""
        try:
            return work()
        except Exception:
            self._findings, self._scores, self.active = None, None, False
            if self.config.on_error == "raise":
                raise
            logger.error("RELEX failed and is switched off; the training goes on without it", exc_info=True)
            self._ranks.release()
            return None

    def _close(self) -> None:
        """No cut is left: record on, or let go."""
        self.schedule.plan = None
        self.active = self.schedule.recording is not None
        if not self.active and not self.config.keep_best:
            self._ranks.release()
            return
        self._ranks.ask("relex_record")
        if self.active:
            logger.info("RELEX: no cut is left; what is trained from here on is recorded, on disk alone")
