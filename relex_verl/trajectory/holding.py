"""Which window of a trajectory gives the weights of a step back."""

from relex_verl.trajectory.index import TrajectoryError, step_ranges
from relex_verl.trajectory.store import Trajectory

__all__ = ["last_before", "window_holding"]


def last_before(trajectory: Trajectory, step: int) -> tuple[Trajectory, int, bool]:
    """The last step up to this one whose weights are known, of those with which training went on: after a jump at it.

    Args:
        trajectory: any window of it.
        step: of the run.

    Returns:
        The window that holds it, the step, and whether its weights are those after a jump (or after one was undone).

    Raises:
        TrajectoryError: the first window begins later.
    """
    numbers = [number for number, record in enumerate(trajectory.windows) if record.origin_step <= step]
    if not numbers:
        begun = trajectory.windows[0].origin_step
        raise TrajectoryError(f"{trajectory.folder} begins at step {begun}, and knows nothing of step {step}")
    held = trajectory.of_window(numbers[-1])
    last = max((one for one in held.steps if one <= step), default=held.record.origin_step)
    jumped = held.record.jump is not None or held.record.undone
    return held, last, jumped and last == held.record.origin_step


def window_holding(trajectory: Trajectory, step: int, after_jump: bool = False) -> Trajectory:
    """The window among whose rows a step is, or of which it is the origin; `replay.states` gives its weights.

    A step after which the run jumped has weights twice: as they were trained, and those with which training went on.

    Args:
        trajectory: any window of it.
        step: an observed step, or one at which a window begins.
        after_jump: those with which training went on after a jump, or after one was undone.

    Raises:
        TrajectoryError: it is in none.
    """
    windows = list(enumerate(trajectory.index.windows))
    jumped = {record.origin_step: number for number, record in windows if record.jump is not None or record.undone}
    if after_jump:
        if step not in jumped:
            where = step_ranges(sorted(jumped))
            raise TrajectoryError(f"{trajectory.folder} has no jump at step {step}, nor one undone; there: {where}")
        return trajectory.of_window(jumped[step])
    holding = [number for number, record in windows if step in record.steps]
    origins = [n for n, record in windows if record.origin_step == step and n not in jumped.values()]
    for number in (*holding, *origins):
        return trajectory.of_window(number)
    known = step_ranges([observed for _, record in windows for observed in record.steps])
    cure = ", and what it jumped to there is given by --after-jump" if step in jumped else ""
    raise TrajectoryError(f"step {step} was not observed; {trajectory.folder} holds {known}{cure}")
