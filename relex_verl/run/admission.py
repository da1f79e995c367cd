"""The one rule by which a run is admitted, for `relex-verl plan` and for the ranks alike: facts in, a decision out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relex_verl.run.budget import Workload, gib

__all__ = ["BudgetError", "Estimate", "NodeEstimate", "RankFacts", "estimate"]

# Adam's two moments, float32: they come with the first step.
OPTIMIZER_BYTES = 8


class BudgetError(RuntimeError):
    """Not enough host memory or disk, with the figures."""


@dataclass(frozen=True)
class RankFacts:
    """What the rule has to know of a rank.

    Attributes:
        node: the host that it runs on; ranks with the same one share its memory.
        elements: parameters that it holds.
        available: bytes of host memory that its node has left; None where nobody knows.
        optimizer_on_host: the training keeps this rank's optimizer state in host memory.
    """

    node: str
    elements: int
    available: int | None = None
    optimizer_on_host: bool = False


@dataclass(frozen=True)
class NodeEstimate:
    """What a node's ranks take, in bytes of host memory.

    Attributes:
        ranks: on this node.
        memory: theirs at the cut.
        to_come: of it, what they are still to take.
        optimizer: what the training itself will take later.
        available: what the node has left; None where nobody knows.
    """

    ranks: int
    memory: int
    to_come: int
    optimizer: int
    available: int | None

    @property
    def spare(self) -> int:
        """What is left over, below 0 where it does not fit; counted from 0 where nobody knows what there is."""
        return (self.available or 0) - self.optimizer - self.to_come

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.available is None or self.spare >= 0


@dataclass(frozen=True)
class Estimate:
    """What following a run takes, and whether it is admitted.

    Attributes:
        workload: what is kept.
        elements: parameters of the model.
        largest: parameters of the rank that holds the most.
        nodes: all of them, the tightest first.
        trajectory, predictions: bytes of disk still to be taken by all ranks.
        disk_free: bytes free in the output folder; None where nobody knows.
        output_dir: the output folder; None where nobody knows.
    """

    workload: Workload
    elements: int
    largest: int
    nodes: tuple[NodeEstimate, ...]
    trajectory: int
    predictions: int
    disk_free: int | None
    output_dir: Path | None

    @property
    def refusal(self) -> str | None:
        """Why the run does not fit, with the figures and what to change; None where it does, as far as is known."""
        node, needed = self.nodes[0], self.trajectory + self.predictions
        if not node.fits:
            later = f", of which the optimizer will take {gib(node.optimizer)}" if node.optimizer else ""
            return (
                f"following this run takes about {gib(node.to_come)} of host memory on a node ({node.ranks} ranks"
                f"{self._assumed}), {gib(node.available or 0)} are available{later}: {self._shorter}raise "
                f"relex.observe_every, {self._cheaper}or run without RELEX"
            )
        if self.disk_free is not None and needed > self.disk_free:
            folder = "relex.output_dir" if self.output_dir is None else f"relex.output_dir={self.output_dir}"
            return (
                f"{folder} has {gib(self.disk_free)} free, about {gib(needed)} are needed ({gib(self.trajectory)} for "
                f"the trajectory{self._assumed}, {gib(self.predictions)} for predicted checkpoints): choose another "
                f"folder, {self._less}"
            )
        return None

    @property
    def admitted(self) -> bool | None:
        """The decision; None where neither memory nor disk is known."""
        if self.disk_free is None and all(node.available is None for node in self.nodes):
            return None
        return self.refusal is None

    @property
    def words(self) -> str:
        """The estimate in a line."""
        node, ranks = self.nodes[0], sum(node.ranks for node in self.nodes)
        there = "" if node.available is None else f" ({gib(node.available)} available)"
        folder = "" if self.output_dir is None else f" in {self.output_dir}"
        return (
            f"{self.elements:.3g} parameters on {ranks} ranks, {self._rows} of {self.workload.kind.name}"
            f"{self._assumed}: about {gib(node.memory)} of host memory on a node of {node.ranks} ranks{there}, "
            f"{gib(self.trajectory)} of trajectory and {gib(self.predictions)} of predictions{folder}"
        )

    @property
    def _rows(self) -> str:
        rows, recorded = self.workload.rows, self.workload.recorded
        return f"{rows} rows" + (f" and {recorded} more, on disk alone," if recorded else "")

    @property
    def _shorter(self) -> str:
        return "lower relex.t_cut, " if self.workload.rows else ""

    @property
    def _less(self) -> str:
        if self.workload.recorded:
            return "raise relex.observe_every, or take relex.record=window"
        return "fewer relex.targets, or an earlier relex.t_cut"

    @property
    def _cheaper(self) -> str:
        copy = "set relex.overlap=false, " if self.workload.overlap else ""
        kinds = ("bf16",) if self.workload.recorded else ("bf16", "sketch")
        others = [name for name in kinds if name != self.workload.kind.trajectory]
        if not others:
            return copy
        return f"{copy}take relex.trajectory={' or '.join(others)}, "

    @property
    def _assumed(self) -> str:
        rate = self.workload.change_rate
        return f", {100 * rate:g}% of the weights changing a step" if self.workload.depends_on_change_rate else ""

    def admit(self) -> None:
        """Let the run go on.

        Raises:
            BudgetError: it does not fit, with the figures and what to change.
        """
        if self.refusal is not None:
            raise BudgetError(self.refusal)


def estimate(
    workload: Workload, ranks: Sequence[RankFacts], disk_free: int | None = None, output_dir: Path | None = None
) -> Estimate:
    """Add up what all ranks take, node by node. The same facts give the same estimate, whoever asks.

    Args:
        workload: what is to be kept.
        ranks: all ranks of the run, one or more.
        disk_free: bytes free in the output folder; None to leave the disk unchecked.
        output_dir: the output folder, for the words.
    """
    by_node: dict[str, list[RankFacts]] = {}
    for rank in ranks:
        by_node.setdefault(rank.node, []).append(rank)
    nodes = sorted((_node(workload, here) for here in by_node.values()), key=_ease)
    elements = sum(rank.elements for rank in ranks)
    return Estimate(
        workload,
        elements,
        max(rank.elements for rank in ranks),
        tuple(nodes),
        workload.trajectory(elements),
        workload.predicted(elements),
        disk_free,
        output_dir,
    )


def _ease(node: NodeEstimate) -> tuple[bool, int]:
    """Sorts nodes, the tightest first; last those of which nobody knows what they have."""
    return node.available is None, node.spare


def _node(workload: Workload, ranks: Sequence[RankFacts]) -> NodeEstimate:
    coming = [rank for rank in ranks if rank.optimizer_on_host and workload.rows_held is None]
    return NodeEstimate(
        ranks=len(ranks),
        memory=sum(workload.memory(rank.elements) for rank in ranks),
        to_come=sum(workload.memory_to_come(rank.elements) for rank in ranks),
        optimizer=OPTIMIZER_BYTES * sum(rank.elements for rank in coming),
        # Each rank has looked at a moment of its own.
        available=min((rank.available for rank in ranks if rank.available is not None), default=None),
    )
