"""Which window of a trajectory gives the weights of a step back."""

from relex_verl.trajectory.index import TrajectoryError, step_ranges
from relex_verl.trajectory.store import Trajectory

__all__ = ["window_holding"]


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
