"""What relex-verl decides in simulated runs, cut after cut, by its own schedule, search and tests."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from judge.world import World
from relex_verl.maths.advice import Advice
from relex_verl.reporting.findings import EarlierCut
from relex_verl.run.config import RelexConfig
from relex_verl.run.cut import Jumps, decide
from relex_verl.run.schedule import Schedule

__all__ = ["Outcome", "simulate"]

STEPS = 200


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        advice: of each cut.
    """

    advice: list[Advice]

    def any(self, action: str) -> bool:
        """Whether one of the decisions was this."""
        return any(advice.action == action for advice in self.advice)


def simulate(world: World, seed: int, on_cut: str = "advise") -> Outcome:
    """A run of 200 steps with the default settings, cut at step 30 and every 30 steps after it."""
    host, config = world.host(seed), RelexConfig.from_mapping({"on_cut": on_cut})
    schedule, advice = Schedule(config, STEPS), list[Advice]()
    while schedule.plan is not None:
        plan = schedule.plan
        host.window = plan.origin, plan.t_cut
        jumps = Jumps(schedule.may_jump) if on_cut == "jump" else None
        # A window that speaks neither for nor against its only method.
        findings: Any = SimpleNamespace(backtests={"relex": 0.5}, drift=0.0, agreement=1.0, origin_step=plan.origin)
        found = decide(host, config, plan, findings, schedule.alpha_share, jumps).advice  # type: ignore[arg-type]
        advice.append(found)
        schedule.earlier.append(EarlierCut(plan.t_cut, found, [], {}))
        schedule.plan = schedule.after(found)
    return Outcome(advice)
