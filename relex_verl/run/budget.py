"""What following a run costs in host memory, disk and traffic: bytes from its shapes alone, nothing is measured here."""

from dataclasses import dataclass

from relex_verl.trajectory.kinds import Kind

__all__ = [
    "CAREFUL_CHANGE_RATE",
    "TYPICAL_CHANGE_RATES",
    "Traffic",
    "Workload",
    "gib",
    "predictions_to_write",
    "traffic",
]

# Share of the bf16 weights that change from one RL step to the next: 0.5-3 % as published for RL of language models
# (verl's delta-sync measurements; PULSE, arXiv:2602.03839), so that 3 % is on the safe side.
CAREFUL_CHANGE_RATE = 0.03
TYPICAL_CHANGE_RATES = (0.005, 0.01)
# Bytes a parameter of a run that jumps: the prediction that the weights are set to, whole before the first one is set; on
# disk theta_0 of the next window, and weights and optimizer state (of Adam) from before a jump.
JUMP_MEMORY, JUMP_DISK = 4, (4, 12)
# The same of a jump with a bound: the weights from before, while the policy is compared.
BOUND_MEMORY = 4
# Files of a sketch on disk at a time: the two that are kept, and the one being written.
SKETCH_FILES = 3


@dataclass(frozen=True)
class Workload:
    """What is to be kept of a run. Its methods answer in bytes, for so many parameters.

    Attributes:
        kind: what is kept of the weights.
        tensors: L; their Gram matrices are held by every rank, twice while G is made from H.
        rows: observed steps up to the cut, those that are there already among them.
        observe_every: steps between two rows.
        predictions: checkpoints to be written.
        change_rate: share of the bf16 weights that change a step.
        rows_held: rows that are in memory and on disk already, beside the state; None before theta_0 is taken.
        checkpoint: bytes of a predicted checkpoint, those of the base; None for all in bfloat16.
        jump: the weights may be set to a prediction, and set back.
        recorded: rows after the cut, which go to disk and stay nowhere else.
        bounded: the policy is compared before and after.
        copies: ranks that hold the same weights; one of them follows an element, and all are set.
        overlap: a copy of the weights is worked on while training goes on.
    """

    kind: Kind
    tensors: int
    rows: int
    observe_every: int
    predictions: int
    change_rate: float = CAREFUL_CHANGE_RATE
    rows_held: int | None = None
    checkpoint: int | None = None
    jump: bool = False
    recorded: int = 0
    bounded: bool = False
    copies: int = 1
    overlap: bool = False

    @property
    def row_bytes(self) -> float:
        """Of a row, a parameter. From row to row at most as many weights change as in all the steps between them."""
        return self.kind.row_bytes(min(1.0, self.change_rate * self.observe_every))

    @property
    def depends_on_change_rate(self) -> bool:
        """Whether a row is smaller where fewer weights change."""
        return self.kind.row_bytes(0.0) != self.kind.row_bytes(1.0)

    def memory(self, elements: int) -> int:
        """Host memory of a rank that holds so many parameters, at the cut."""
        gram = 2 * self.tensors * self.rows**2 * 8
        prediction = JUMP_MEMORY if self.jump else 0
        own = BOUND_MEMORY if self.bounded else 0
        rows = max(self.rows, min(self.recorded, 1))  # one that is recorded is in memory until it is written
        return self._state_and_rows(elements, rows) + gram + (prediction + own) * self.copies * elements

    def memory_to_come(self, elements: int) -> int:
        """Of `memory`, what is still to be taken. G is made anew, of all rows."""
        held = 0 if self.rows_held is None else self._state_and_rows(elements, self.rows_held)
        return self.memory(elements) - held

    def staging(self, elements: int) -> int:
        """Of `memory`, the copy of the weights."""
        return self.kind.state_bytes * elements if self.overlap else 0

    def _state_and_rows(self, elements: int, rows: int) -> int:
        kind = self.kind
        kept = round(elements * (kind.state_bytes + kind.fixed_bytes + rows * self.row_bytes))
        return kept + self.staging(elements)

    def trajectory(self, elements: int) -> int:
        """Disk for the trajectory of so many parameters, all ranks together, that is still to be taken."""
        held, files = self.rows_held or 0, SKETCH_FILES
        if held:
            files -= 1  # that of the cut behind
        jump = JUMP_DISK[0] + JUMP_DISK[1] * self.copies if self.jump else 0
        rows = self.rows - held + self.recorded
        return round(elements * (rows * self.row_bytes + files * self.kind.fixed_bytes + jump))

    def predicted(self, elements: int) -> int:
        """Disk for the predicted checkpoints."""
        return (2 * elements if self.checkpoint is None else self.checkpoint) * self.predictions


def predictions_to_write(configured: int | None, best: bool = False) -> int:
    """Checkpoints that a run may write: the configured ones of a cut, and one that the search finds beside them.

    Args:
        configured: predictions; None of a run that writes none.
        best: the best observed step is kept, and the one before it until it is complete.
    """
    return (0 if configured is None else configured + 1) + (2 if best else 0)


def gib(size: float) -> str:
    """A number of bytes for people; the one unit in which memory and disk are told."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**30:.3f} GiB"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank moves.

    Attributes:
        observe: memory read at the last observed step (the most of any): weights, state, and all that is kept so far; for a
            sketch also written back.
        append: disk, written at every observed step; nothing for a sketch, which is stored at cuts and checkpoints.
        predict: memory read and written for one prediction at the cut.
    """

    observe: int
    append: int
    predict: int


def traffic(workload: Workload, elements: int) -> Traffic:
    """Estimate what a rank moves; divide by a bandwidth for a time.

    Args:
        workload: what is kept.
        elements: parameters in one rank's shards.
    """
    kind = workload.kind
    row = elements * workload.row_bytes
    state, fixed = elements * kind.state_bytes, elements * kind.fixed_bytes
    kept = workload.rows * row + fixed
    return Traffic(round(2 * state + kept + fixed), round(row), round(state + kept + 2 * elements))
