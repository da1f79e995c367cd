"""Whether a trajectory on disk is whole."""

from dataclasses import asdict

import typer

from relex_verl.cli.arguments import AsJson, BaseNow, TrajectoryFolder
from relex_verl.cli.screen import clear_errors, console, print_fact, print_json, step_bar
from relex_verl.offline.verify import verify as verified
from relex_verl.trajectory.store import Trajectory

__all__ = ["verify"]


def verify(trajectory: TrajectoryFolder, base: BaseNow = None, as_json: AsJson = False) -> None:
    """Read every file of a trajectory and compare it with its checksum; exit status 1 where one is damaged.

    Says of each window up to which step it can be used, and which files no run counts: those of steps after verl's last
    checkpoint, for example, which the next start of the run writes anew.
    """
    with clear_errors():
        opened = Trajectory(trajectory)
        files = opened.index.world_size * sum(len(window.steps) for window in opened.windows)
        with step_bar("reading", files) as advance:
            found = verified(trajectory, base, advance)
    if as_json:
        print_json(asdict(found))
    else:
        for what, why in found.damaged.items():
            console.print(f"damaged: {what}: {why}", highlight=False, soft_wrap=True)
        for path in found.unexplained:
            console.print(f"no run counts: {path}", highlight=False, soft_wrap=True)
        if found.unchecked:
            console.print(f"{len(found.unchecked)} files have no checksum (version 0.1.0), and can be read")
        for number, last in found.whole_until.items():
            name = f"window {number}" if len(found.whole_until) > 1 else "trajectory"
            print_fact(f"{name}", "cannot be used" if last is None else f"whole up to step {last}")
        print_fact("files", f"{found.files} read, {len(found.damaged)} damaged")
    if found.damaged:
        raise typer.Exit(1)
