"""What a rank keeps of the weights that it follows: every row, or a sketch of all of them, or no row but on disk.

A collector works on this rank's shards alone. `take` computes what the ranks then add up; `keep` gets the sum. Whoever
calls them (`Observer`) does the communication and the writing in between.
"""

from relex_verl.trajectory.collectors.collector import Collector, Held, Taken
from relex_verl.trajectory.collectors.recorded import RowRecorder
from relex_verl.trajectory.collectors.rows import RowCollector
from relex_verl.trajectory.collectors.sketched import SketchCollector
from relex_verl.trajectory.kinds import Kind

__all__ = ["Collector", "Held", "RowCollector", "RowRecorder", "SketchCollector", "Taken", "collector_of"]


def collector_of(kind: Kind) -> Collector:
    """The collector of a kind of trajectory."""
    return RowCollector(kind) if kind.keeps_rows else SketchCollector(kind)
