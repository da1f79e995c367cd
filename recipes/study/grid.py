"""What the study varies: seeds, learning rates, trajectories, prefixes, methods and targets."""

from dataclasses import dataclass

from relex_verl.maths.extrapolators import METHODS
from relex_verl.trajectory.kinds import AUTO_ROWS

PROMPTS, SAMPLES = 64, 8  # a step
SKETCH = "sketch-4"  # folder and encoding of the sketch, which follows the whole run


@dataclass(frozen=True)
class Run:
    """One training run."""

    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lr{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Arm:
    """One way to record the prefix, and what is predicted from it.

    Attributes:
        name: as the results call it.
        encoding: a name in `relex_verl.trajectory.kinds.KINDS`.
        every_step: a row each step; else about 16 rows in the prefix, as `relex.observe_every=auto` takes them.
        methods: whose predictions are scored; none for the yardsticks of the quantisation error.
        every_target: score them at every target, else at the last step of the run only.
    """

    name: str
    encoding: str
    every_step: bool
    methods: tuple[str, ...]
    every_target: bool = True

    def trajectory(self, cut: int) -> str:
        """Folder of the trajectory to read for a prefix: every-step rows serve all prefixes."""
        return self.encoding if self.every_step else f"{self.encoding}-cut{cut}"

    def spacing(self, cut: int) -> int:
        """Steps between two rows."""
        return 1 if self.every_step else max(1, round(cut / AUTO_ROWS))


ARMS = (
    Arm("bf16", "bf16", True, tuple(METHODS)),
    Arm("fp32", "fp32-int8", False, tuple(METHODS)),
    Arm("fp32-every-step", "fp32-int8", True, ("relex", "anchored"), every_target=False),
    Arm("fp32-int4", "fp32-int4", False, ()),
    Arm("fp32-int4-every-step", "fp32-int4", True, ()),
    Arm("fp32-none", "fp32-none", True, ()),
    Arm("sketch", SKETCH, True, ()),
)
# Their predictions do not depend on the target.
ONE_TARGET = ("hold", "expo")


@dataclass(frozen=True)
class Grid:
    """A whole study.

    Attributes:
        steps: of each training run.
        cuts: last step of each prefix, ascending.
        targets: prefix -> the steps to predict; those after `steps` have no truth to compare with.
        learning_rates, seeds: of the runs.
    """

    steps: int
    cuts: tuple[int, ...]
    targets: dict[int, tuple[int, ...]]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def runs(self) -> list[Run]:
        """Every run, a whole seed before the next one."""
        return [Run(rate, seed) for seed in self.seeds for rate in self.learning_rates]

    def checkpoints(self) -> list[int]:
        """Steps at which the true weights are kept: the prefixes' ends and every target that the run reaches."""
        wanted = {*self.cuts, *(target for targets in self.targets.values() for target in targets), self.steps}
        return sorted(step for step in wanted if step <= self.steps)

    def arms(self, run: Run) -> list[Arm]:
        """The arms of a run: the errors of quantisation and sketch are measured with the first seed."""
        return [arm for arm in ARMS if arm.methods or self.is_yardstick(run)]

    def is_yardstick(self, run: Run) -> bool:
        """Whether errors are measured on this run, for which all of its states are kept."""
        return run.seed == self.seeds[0]

    def rows(self, arm: Arm) -> dict[str, tuple[int, int]]:
        """Trajectory folder -> (spacing of its rows, its last step)."""
        if arm.encoding == SKETCH:
            return {SKETCH: (1, self.steps)}
        return {arm.trajectory(cut): (arm.spacing(cut), cut) for cut in self.cuts}


FULL = Grid(
    steps=400,
    cuts=(30, 60),  # 7.5% and 15%
    targets={30: (60, 120, 240, 400, 750), 60: (120, 240, 400, 800, 1500)},  # 25 times the prefix
    learning_rates=(3e-7, 6e-7, 2e-6),
    seeds=(1, 2, 3),
)
QUICK = Grid(
    steps=40, cuts=(6, 12), targets={6: (12, 24, 40, 150), 12: (24, 40, 300)}, learning_rates=(2e-6,), seeds=(1, 2)
)
