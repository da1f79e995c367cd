"""What of a trajectory counts for a run that resumes: the window in which it goes on, and the rows that are whole."""

from copy import copy, deepcopy

from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.store import Trajectory

__all__ = ["forget", "readable_until", "window_at"]


def window_at(trajectory: Trajectory, step: int) -> Trajectory | None:
    """The last window that begins at a step or before, of a trajectory without those after it.

    Nothing on disk changes.

    Args:
        trajectory: any window of it.
        step: that training goes on from.

    Returns:
        None where the first window begins after the step.

    Raises:
        TrajectoryError: the checkpoint of that step may come from a jump that was given up.
    """
    back = copy(trajectory)
    back.index = deepcopy(trajectory.index)
    last, given_up = back.index.windows[-1].last, set(back.index.given_up)
    lost = min((begun for begun in given_up if last < begun < step), default=None)
    if lost is not None:
        raise TrajectoryError(
            f"{back.folder} was resumed before step {lost}, at which a window began, and knows nothing of what this run "
            f"did up to step {step}: give the checkpoint of step {last} or one before, or give this run its own "
            "relex.output_dir"
        )
    kept = [window for window in back.index.windows if window.origin_step <= step]
    given_up |= {window.origin_step for window in back.index.windows[len(kept) :]}
    back.index.windows, back.index.given_up = kept, sorted(given_up)
    return back.of_window(-1) if kept else None


def readable_until(trajectory: Trajectory, rank: int, step: int) -> int:
    """The last step up to `step` before which no file of a rank that the index names is damaged."""
    last, keeps_rows = 0, trajectory.kind.keeps_rows
    for named in trajectory.steps if keeps_rows else trajectory.record.stored:
        if named > step:
            break
        try:
            trajectory.load(rank, named)
        except TrajectoryError:
            if keeps_rows:
                return last
            continue  # an older or newer sketch is as whole
        last = named
    return step if keeps_rows else last


def forget(trajectory: Trajectory, after: int) -> None:
    """The steps after this one do not count any more; of a sketch, those after its last file up to there."""
    record, last = trajectory.record, after
    if not trajectory.kind.keeps_rows:
        last = max((stored for stored in record.stored if stored <= after), default=0)
    record.steps = [step for step in record.steps if step <= last]
    record.stored = [step for step in record.stored if step <= after]
