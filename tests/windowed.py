"""Runs that jump: what their driver asks of an observer, with every step's weights known, killed and resumed anywhere."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from fakes import RankSource
from recorded import random_weights

from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.store import Trajectory

BASE = random_weights(scale=0.05)
RUN = {"project": "p", "experiment": "e"}
MOMENTS = ("trained", "observed", "saved", "beginning")  # of a step, after which a run can be killed

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Script:
    """What happens in a run.

    Attributes:
        last: its last step.
        observed: the steps that are observed.
        saved: the steps at which the host saves a checkpoint, with the weights as they were trained.
        begins: step -> how a window begins after it, "plain", "jump" or "undone".
        kills: (step, moment, the checkpoint that is resumed from), one after the other; 0 is none, a start from the base.
    """

    last: int
    observed: frozenset[int]
    saved: frozenset[int]
    begins: Mapping[int, str]
    kills: tuple[tuple[int, str, int], ...] = field(default=())


def script(rng: random.Random, keeps_rows: bool) -> Script:
    """Any run; one that keeps a sketch resumes from its latest checkpoint, since older rows are in no file."""
    last = rng.randint(2, 12)
    steps = range(1, last + 1)
    observed, saved = (frozenset(step for step in steps if rng.random() < share) for share in (0.7, 0.5))
    begins: dict[int, str] = {}
    for step in steps:
        if rng.random() < 0.35:
            ways = ["plain", "jump"] + ["undone"] * (list(begins.values())[-1:] == ["jump"])
            begins[step] = rng.choice(ways)
    kills, resumed, there = [], 0, {0}
    for _ in range(rng.randint(0, 3)):
        if resumed == last:
            break
        step, moment = rng.randint(resumed + 1, last), rng.choice(MOMENTS)
        there |= {one for one in saved if one < step or (one == step and moment in ("saved", "beginning"))}
        resumed = rng.choice(sorted(there)) if keeps_rows else max(there)
        there = {one for one in there if one <= resumed}  # the later ones are of an attempt that was given up
        kills.append((step, moment, resumed))
    return Script(last, observed, saved, begins, tuple(kills))


class History:
    """Every step's weights of a run: `trained` by the step, `base` and `gone_on` with: after a jump, or one undone."""

    def __init__(self, script: Script, dtype: torch.dtype) -> None:
        self.trained: dict[int, Weights] = {}
        self.gone_on: dict[int, Weights] = {0: _rounded(BASE, dtype)}
        jumped_from = 0
        for step in range(1, script.last + 1):
            now = self.trained[step] = _moved(self.gone_on[step - 1], step, 1e-3, dtype)
            way = script.begins.get(step, "plain")
            jumped_from = step if way == "jump" else jumped_from
            ways = {"plain": lambda now=now: now, "undone": lambda at=jumped_from: self.trained[at]}
            ways["jump"] = lambda now=now, step=step: _moved(now, 1000 + step, 2e-2, dtype)
            self.gone_on[step] = ways[way]()


noise_of = lru_cache(256)(lambda seed: random_weights(seed=seed))


def _moved(weights: Weights, seed: int, rate: float, dtype: torch.dtype) -> Weights:
    noise = noise_of(seed)
    return _rounded({name: tensor + rate * noise[name] for name, tensor in weights.items()}, dtype)


def _rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    return {name: tensor.to(dtype).float() for name, tensor in weights.items()}


def jump_at(step: int) -> dict[str, object]:
    """What an index says of one."""
    return {"method": "relex", "target": step + 20, "rank": 1, "fit_from": 1, "optimizer": "keep"}


class Driver:
    """One rank of a run by a script, and what the driver has it do."""

    def __init__(self, folder: Path, base: Path, kind: str, script: Script, rank: int = 0, world: int = 1) -> None:
        self.folder, self.base, self.kind, self.script = folder, base, KINDS[kind], script
        self.rank, self.world = rank, world
        self.history = History(script, self.kind.dtype)

    def run(self) -> Observer:
        """From the start to the end, by way of all kills."""
        at, observer = 0, self.begin(0)
        for step, moment, resumed in self.script.kills:
            if step > at:
                self.train(observer, at, step, moment)
            at, observer = resumed, self.begin(resumed)
        self.train(observer, at, self.script.last, "")
        observer.save()
        return observer

    def begin(self, step: int) -> Observer:
        """Start or resume, after a checkpoint was loaded; what began at its step begins again."""
        observer = Observer(self.folder, str(self.base), {}, RUN, self.kind)
        observer.start(self.source(self.history.gone_on[0]))
        observer.open(step)
        if observer.replays is not None:
            assert (observer.replays.origin_step, observer.steps) == (step, [])
            for shard, wanted in self.pairs(observer, self.history.gone_on[step]):
                assert torch.equal(shard, wanted)
        elif step in self.script.begins:
            self.begin_window(observer, step)
        return observer

    def train(self, observer: Observer, start: int, stop: int, moment: str) -> None:
        """The steps after `start` up to a moment of `stop`."""
        for step in range(start + 1, stop + 1):
            until = MOMENTS.index(moment) if step == stop and moment else len(MOMENTS)
            if until >= 1 and step in self.script.observed:
                observer.observe(step, self.source(self.history.trained[step]))
            if until >= 2 and step in self.script.saved:
                observer.save()
            if step in self.script.begins and until >= 3:
                if until == 3:
                    self.declare_only(observer, step)
                else:
                    self.begin_window(observer, step)

    def begin_window(self, observer: Observer, step: int) -> None:
        way = self.script.begins[step]
        jump = jump_at(step) if way == "jump" else None
        observer.begin_window(step, self.source(self.history.gone_on[step]), jump, way == "undone")

    def declare_only(self, observer: Observer, step: int) -> None:
        """Killed after the ranks have written the new origin, before the index names it."""
        observer.save()
        window = observer.trajectory.begin_window(step)
        placements = {name: held.placement for name, held in observer.held.items()}
        window.declare_rank(self.rank, placements, torch.full_like(observer._states, 7.0))

    def source(self, weights: Weights) -> RankSource:
        return RankSource(weights, self.rank, self.world)

    def pairs(self, observer: Observer, weights: Weights) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's shards of theta_0 beside what they have to be."""
        shards = list(observer.origin_shards())
        assert [shard.name for shard in shards] == [name for name in observer.shapes if name in observer.held]
        return [(shard.data, part(weights, shard)) for shard in shards]


def part(weights: Weights, shard) -> torch.Tensor:
    """The elements of a shard, in its own type."""
    flat = weights[shard.name].flatten()
    return torch.cat([flat[s : s + n] for _, s, n in shard.placement.runs()]).to(shard.data.dtype)


def named_content(folder: Path) -> dict[str, object]:
    """What a trajectory's index says of windows, and the bytes of every file that it names."""
    trajectory = Trajectory(folder)
    content: dict[str, object] = {"windows": json.loads((folder / "index.json").read_text())["windows"]}
    for window in trajectory.index.windows:
        steps = window.steps if trajectory.kind.keeps_rows else window.stored
        files = ["placements.json", *(f"step_{step:06d}.safetensors" for step in steps)]
        files += ["origin.safetensors"] * (window.origin == "stored")
        for rank in range(trajectory.index.world_size):
            for file in files:
                path = folder / window.folder / f"rank_{rank:05d}" / file
                content[str(path.relative_to(folder))] = path.read_bytes()
    assert {path.name for path in folder.glob("window_*")} == {window.folder for window in trajectory.index.windows}
    return content
