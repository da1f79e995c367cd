"""A rank of a run around weights in memory, which the next step overwrites in place, as an optimizer does it."""

from pathlib import Path
from typing import Any

from fakes import DriftingModel, RankSource
from pipeline import weights_of

from relex_verl.run.budget import predictions_to_write
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import RunFacts, Setup
from relex_verl.run.rank import RelexRank
from relex_verl.run.schedule import Schedule
from relex_verl.trajectory.shards import ShardSource

__all__ = ["Engine", "rank_of"]


class Engine:
    """A host's engine, as `protocol.Engine`, that offloads its optimizer.

    Attributes:
        step: whose weights it has; set it to train.
    """

    no_master = None
    optimizer_on_host = True
    adapters = None
    aliases: dict[str, str]

    def __init__(self, model: DriftingModel, rank: int = 0, world: int = 1) -> None:
        self.aliases, self._model, self._where = {}, model, (rank, world)
        self._step, self.weights = 0, model.at(0)

    @property
    def step(self) -> int:
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        for name, tensor in self._model.at(step).items():
            self.weights[name].copy_(tensor)

    def shards(self, master: bool) -> ShardSource:
        return RankSource(self.weights, *self._where)


def rank_of(base: Path, folder: Path, rank: int = 0, world: int = 1, **relex: Any) -> tuple[RelexRank, Engine]:
    """Not started yet; of a run of 20 steps that is cut at step 3, unless it is said otherwise."""
    config = RelexConfig.from_mapping({"t_cut": 3, "targets": [20], "observe_every": 1, **relex})
    schedule = Schedule(config, 20)
    engine = Engine(DriftingModel(weights_of(base)), rank, world)
    predictions = predictions_to_write(len(schedule.predictions))
    facts = RunFacts(str(base), "p", "e")
    setup = Setup(config, schedule.plans, predictions, folder, facts, schedule.recordings)
    return RelexRank(setup, engine), engine
