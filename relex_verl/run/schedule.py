"""The cuts of a run: the coming one, those behind it, and what each may spend of the test's level."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from relex_verl.maths.advice import Advice, alpha_share
from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import Cost, EarlierCut, Scored
from relex_verl.run.budget import predictions_to_write
from relex_verl.run.config import RelexConfig
from relex_verl.run.plan import NEAREST_JUMP, Plan, Recording, following, recording
from relex_verl.trajectory.kinds import KINDS

__all__ = ["Schedule"]

# A row in so many of those that were to be taken still follows the line; fewer leave nothing to fit.
MOST_THINNED = 8
logger = logging.getLogger("relex_verl")


class Schedule:
    """Resolves the configuration against one run.

    Attributes:
        kind: of trajectory, by which the weights are followed.
        plans: the first cut, by the name of each kind that it may come to.
        plan: the coming cut; None when there is none any more.
        recordings: of a run that is recorded whole: what is recorded after the last cut, by the name of each kind.
        earlier: what was found at the cuts behind it.
        samples_a_step: that a training step generates; None where nobody has said.
    """

    def __init__(self, config: RelexConfig, total_steps: int, samples_a_step: int | None = None) -> None:
        """Plan the first cut.

        Raises:
            ConfigError: cut or targets do not fit the run.
        """
        self.kind = config.kind
        names = [name for name in (self.kind.name, self.kind.fallback) if name is not None]
        cuts = [] if config.t_cut is None else names
        self.plans = {name: config.plan(total_steps, KINDS[name]) for name in cuts}
        self.plan: Plan | None = self.plans.get(self.kind.name)
        recorded = {name: recording(config, total_steps, KINDS[name]) for name in names}
        self.recordings = {name: one for name, one in recorded.items() if one is not None}
        self.earlier: list[EarlierCut] = []
        self.samples_a_step = samples_a_step
        self._config, self._total_steps = config, total_steps
        self._first_cut = 0 if self.plan is None else self.plan.t_cut
        self._thinned = 1  # times as rare as configured, see `thin_out`

    @property
    def recording(self) -> Recording | None:
        """What is recorded after the last cut; None where nothing is."""
        return self.recordings.get(self.kind.name)

    def observes(self, step: int) -> bool:
        """Whether a row is taken after this step. A cut whose step the host has skipped is made at this one."""
        self._reach(step)
        following = self.plan or self.recording
        return following is not None and following.observes(step)

    def cuts_at(self, step: int) -> bool:
        """Whether the coming cut is at this step."""
        return self.plan is not None and step == self.plan.t_cut

    @property
    def predictions(self) -> list[Prediction]:
        """The configured ones of the coming cut."""
        methods, targets = self._config.methods, [] if self.plan is None else self.plan.targets
        if self._config.on_cut == "jump":
            return []  # what wins is trained on from, and stays in the trajectory
        return [self.prediction(method, target) for method in methods for target in targets]

    @property
    def checkpoints(self) -> int:
        """How many are written at the coming cut and, with `relex.keep_best`, beside it."""
        written = None if self._config.on_cut == "jump" or self.plan is None else len(self.predictions)
        return predictions_to_write(written, self._config.keep_best)

    def prediction(self, method: str, target: int) -> Prediction:
        """With the configured rank and first step."""
        return Prediction(method, target, self._config.rank, self._config.fit_from)

    @property
    def alpha_share(self) -> float:
        """Share of alpha = 1 - confidence that the coming cut may spend."""
        return alpha_share(len(self.earlier), last=self.following() is None)

    @property
    def saved(self) -> int:
        """Steps that need not be trained if the run ends at the coming cut."""
        return 0 if self.plan is None else self._total_steps - self.plan.t_cut

    def scoring(self, scored: Sequence[Scored]) -> Cost:
        """What these scores, those of the coming cut, and those of the cuts behind it took."""
        return Cost.of([*(row for cut in self.earlier for row in cut.validation_scores), *scored], self.samples_a_step)

    def follow(self, kind: str) -> None:
        """Take the kind of trajectory that the engine allows, by its name."""
        self.kind, self.plan = KINDS[kind], self.plans.get(kind)

    def _reach(self, step: int) -> None:
        if self.plan is not None and self.plan.t_cut < step < self._total_steps:
            logger.warning("RELEX: the run has skipped step %d, the cut is at step %d instead", self.plan.t_cut, step)
            targets = [target for target in self.plan.targets if target > step] or [self._total_steps]
            self.plan = replace(self.plan, t_cut=step, targets=targets)

    def following(self) -> Plan | None:
        """The cut after the coming one, if that does not win; None when the run ends before it."""
        if self.plan is None:
            return None
        plan = following(self._config, self.plan, self._first_cut, self._total_steps, self.kind)
        if plan is not None and self._config.on_cut == "jump":
            plan = replace(plan, observe_every=plan.observe_every * self._thinned)
        if plan is None or not self.jumps:
            return plan
        # The line is about as good again as it was: the search begins where it won last.
        windows = self._horizon(self.jumps[-1])
        return replace(plan, targets=[plan.origin + ceil(windows * (plan.t_cut - plan.origin))])

    def thin_out(self) -> int | None:
        """Have half as many rows from here on: the steps between two. None, and no more, where they are rare already."""
        if self._thinned == MOST_THINNED:
            self.recordings = {}
            return None
        self._thinned *= 2
        self.recordings = {name: one.thinner() for name, one in self.recordings.items()}
        if self.plan is not None:
            self.plan = replace(self.plan, observe_every=2 * self.plan.observe_every)
        following = self.plan or self.recording
        return None if following is None else following.observe_every

    def _horizon(self, cut: EarlierCut) -> float:
        """How many windows far the jump of a cut went; 1 is the cut itself."""
        assert cut.advice.target is not None
        origin = cut.origin_step or 0
        return max(NEAREST_JUMP, (cut.advice.target.target - origin) / (cut.t_cut - origin))

    def after(self, advice: Advice) -> Plan | None:
        """The cut up to which a run is observed on that was given this advice at the coming one; None where it is not.

        Args:
            advice: whether or not it is among the `earlier` ones already.
        """
        if self._config.on_cut != "jump":
            return self.following() if advice.action == "keep_training" else None
        jumps = [cut.advice for cut in self.jumps]
        jumps += [advice] if advice.action == "jump" and advice not in jumps else []
        most = self._config.max_jumps
        if most is not None and len(jumps) >= most and not (jumps[-1] is advice and self._config.jump_undo):
            return None  # no jump is left, nor one to be undone
        return self.following()

    @property
    def jumps(self) -> list[EarlierCut]:
        """The cuts at which the weights were set to a prediction."""
        return [cut for cut in self.earlier if cut.advice.action == "jump"]

    @property
    def may_jump(self) -> bool:
        """Whether the coming cut may: there are steps to be trained after it, and fewer jumps behind than allowed."""
        most = self._config.max_jumps
        allowed = most is None or len(self.jumps) < most
        return allowed and self.plan is not None and self.plan.t_cut < self._total_steps

    @property
    def undoable(self) -> EarlierCut | None:
        """The cut before the coming one, if it jumped and the jump may be undone."""
        last = self.earlier[-1] if self.earlier else None
        return last if last is not None and last.advice.action == "jump" and self._config.jump_undo else None

    def resume(self, step: int, earlier: Sequence[EarlierCut]) -> None:
        """Go to the cut that comes next after a step. It may be that step's own, when it came to no verdict.

        Args:
            step: that training goes on from.
            earlier: the cuts up to it that came to a verdict.
        """
        self.earlier = list(earlier)
        final = [cut.advice for cut in earlier if cut.advice.action != "keep_training"]
        if final and self._config.on_cut != "jump":
            logger.info("RELEX: no further cut, since this run has its verdict. %s", final[-1].reason)
            self.plan = None
        verdicts = {cut.t_cut for cut in earlier}
        while self.plan is not None and (step > self.plan.t_cut or self.plan.t_cut in verdicts):
            self.skip(step)

    def skip(self, step: int) -> None:
        """Leave the coming cut out: training goes on from a step behind it, or its rows are missing."""
        assert self.plan is not None
        logger.info("RELEX: training resumes at step %d, the cut at %d is behind it", step, self.plan.t_cut)
        self.plan = self.following()
