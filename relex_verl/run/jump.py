"""The cuts of a run that jumps, as the driver sees them: what one may do, doing it, and doing it again after a restart."""

import logging
from collections.abc import Callable

from relex_verl.maths.advice import Advice
from relex_verl.maths.harm import judge_distance
from relex_verl.reporting.findings import CutReport
from relex_verl.run.config import RelexConfig
from relex_verl.run.cut import Jumps, Verdict
from relex_verl.run.output import OutputFolder
from relex_verl.run.protocol import Host
from relex_verl.run.ranks import Ranks
from relex_verl.run.schedule import Schedule

__all__ = ["carry_out", "go_on_from", "jumps_before"]

logger = logging.getLogger("relex_verl")


def jumps_before(config: RelexConfig, schedule: Schedule, output: OutputFolder) -> Jumps | None:
    """What the coming cut has to know of those before; None of a run that does not jump."""
    if config.on_cut != "jump":
        return None
    last = schedule.undoable
    if last is None:
        return Jumps(schedule.may_jump)
    before = output.observed_scores(last.t_cut)
    if before is None:
        logger.warning("RELEX: the scores from before the jump at step %d are gone: it stays", last.t_cut)
    return Jumps(schedule.may_jump, last.t_cut, before)


def carry_out(
    ranks: Ranks,
    config: RelexConfig,
    step: int,
    verdict: Verdict,
    host: Host,
    output: OutputFolder,
    report: Callable[[], CutReport],
) -> None:
    """Jump, undo the last jump, or train on; in any case a window begins. The rollout's weights are not touched.

    Args:
        ranks: all of them.
        config: the `relex` node.
        step: the training step just done.
        verdict: of the cut at this step. Gets `relex/jump/...`: whether it was made, or one undone; of one that was made its
            target, how many steps that is ahead, the gain on the deciding half of the prompts, and the distance in the space
            of all weights. With `relex.jump_kl_max` also the KL; a jump beyond it becomes advice to keep training.
        host: the trainer; its rollout may be asleep afterwards.
        output: where the decision is written down first. A run that is killed after the jump has to know of it: it may be
            undone, and the next search begins where this one won.
        report: of the cut.

    Raises:
        RelexError: a rank failed. Then no weight has been set, or all ranks have set theirs.
    """
    if verdict.advice.action == "jump" and config.jump_kl_max is not None:
        host.relex_rest()  # a forward pass of the engine wants the device for itself, as verl's own does
        kl: float = ranks.ask("relex_kl", step, verdict.advice.target)
        verdict.advice = judge_distance(verdict.advice, kl, config.jump_kl_max)
        verdict.jump["relex/jump/kl"] = kl
    output.decide(report(), verdict.validations(step))
    verdict.jump |= _act(ranks, config, step, verdict.advice)


def _act(ranks: Ranks, config: RelexConfig, step: int, advice: Advice) -> dict[str, float]:
    flat = {"relex/jump/made": float(advice.action == "jump"), "relex/jump/undone": float(advice.action == "undo")}
    if advice.action == "undo":
        ranks.ask("relex_undo", step)
        logger.info("RELEX: weights and optimizer are again what they were before the last jump")
        return flat
    if advice.action != "jump":
        ranks.ask("relex_begin", step)
        return flat
    assert advice.target is not None
    assert advice.score is not None
    assert advice.hold_score is not None
    distance = ranks.ask("relex_jump", step, advice.target, config.jump_optimizer, config.jump_undo)
    logger.info("RELEX: the weights are %s now; training goes on from there", advice.target.folder_name)
    return flat | {
        "relex/jump/target": float(advice.target.target),
        "relex/jump/horizon": float(advice.target.target - step),
        "relex/jump/gain": advice.score - advice.hold_score,
        "relex/jump/distance": distance,
    }


def go_on_from(ranks: Ranks, schedule: Schedule, output: OutputFolder, step: int) -> None:
    """A window begins at the very step of the host's checkpoint, which was saved before its jump: make it again.

    Raises:
        RuntimeError, ValueError: it cannot be made again; nothing has been trained yet.
    """
    again = ranks.ask_or_refuse("relex_replay")
    logger.info("RELEX: a window begins at step %d%s", step, f"; {again}" if again else "")
    if schedule.plan is None or schedule.plan.t_cut != step:
        return
    report = output.decided(step)  # killed before its report was written
    if report is None:
        schedule.skip(step)
    else:
        output.keep(report)
        schedule.resume(step, [*schedule.earlier, report.summary])
