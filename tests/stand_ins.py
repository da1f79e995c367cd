"""Stand-ins for what surrounds the driver's decisions: the ranks and the trainer."""

import json
from collections.abc import Collection, Mapping
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from relex_verl.maths.extrapolators import Prediction
from relex_verl.reporting.findings import Findings, Fits
from relex_verl.run.callback import RelexCallback
from relex_verl.run.config import RelexConfig
from relex_verl.run.protocol import Answer, Opened, RunFacts, Started
from relex_verl.run.validation import Validation

METRIC = "val-core/sums/acc/mean@1"
PROMPTS = [f"prompt {i}" for i in range(400)]
STEPS = 20
CUT = 4


def config(
    folder: Path, resume_mode: str = "auto", experiment: str = "e", **relex: Any
) -> tuple[RelexConfig, RunFacts]:
    """A run that is cut at step 4."""
    targets = {} if relex.get("on_cut") == "jump" else {"targets": [20]}
    node = {"output_dir": str(folder), **targets, "t_cut": CUT, "observe_every": 1, "max_overhead": None, **relex}
    return RelexConfig.from_mapping(node), RunFacts("base", "p", experiment, resume_mode)


class Workers:
    """Two ranks that do nothing well, and keep the steps of the trajectory in its index.

    Attributes:
        fails: the method in which rank 1 fails, with an error of this `kind`.
        calls: methods, in the order of the calls.
        reason: why the engine does not allow the configured trajectory, if so.
        recording: no row is kept in memory.
    """

    def __init__(self, folder: Path, fails: str = "", kind: str = "OSError", reason: str | None = None) -> None:
        self.folder, self.fails, self.kind, self.reason = folder, fails, kind, reason
        self.calls: list[str] = []
        self.setup: Any = None
        self.origin = 0  # of the window that is observed
        self.began = False  # at the step that the run was resumed from
        self.jumps: list[tuple[Any, ...]] = []
        self.recording = False
        self.kl = 0.01  # of every jump

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> list[Answer]:
            self.calls.append(method)
            if method == self.fails:
                return [
                    Answer(error="1 of 2 ranks failed", kind="PeerError", peer=True),
                    Answer(error=f"disk on fire\nTraceback: {self.kind}", kind=self.kind),
                ]
            answer = getattr(type(self), f"_{method}", None)
            return [Answer(None if answer is None else answer(self, *args)), Answer({})]

        return call

    def _relex_start(self, setup: Any) -> Started:
        self.setup = setup
        kind = setup.config.kind
        fallback = None if self.reason is None else kind.fallback
        return Started(kind.name if fallback is None else fallback, self.reason, "needs 3 GiB")

    def _relex_open(self, step: int, recording: bool = False) -> Opened:
        self.recording = recording
        kept = [one for one in self.steps if one <= step]
        self._write(kept)
        return Opened(kept, self.began)

    def _relex_record(self) -> None:
        self.recording = True

    def _relex_kl(self, step: int, prediction: Prediction) -> float:
        return self.kl

    def _relex_jump(self, step: int, *how: Any) -> float:
        self.origin = step
        self.jumps.append((step, *how))
        return 1.5

    def _relex_undo(self, step: int) -> None:
        self.origin = step
        self.jumps.append((step, "undone"))

    def _relex_begin(self, step: int) -> None:
        self.origin = step

    def _relex_observe(self, step: int, now: bool) -> dict[str, float]:
        self._write([*self.steps, step])
        return {"relex/changed_share": 0.1, "relex/drift": nan}

    def _relex_fit(self, methods: list[str], targets: list[int]) -> Findings:
        fits = Fits(summary={}, random_walk_null={"drift": nan}, tensors=[{"tensor": "w", "shape": [1]}])
        steps = [step for step in self.steps if step > self.origin]
        return Findings(steps, self.origin, fits, dict.fromkeys(methods, 0.5), drift=0.1, agreement=0.9, figures={})

    def _relex_write(self, prediction: Prediction, folder: Path, provenance: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "relex.json").write_text(json.dumps(provenance))

    def _relex_keep(self, folder: Path, provenance: Mapping[str, Any]) -> None:
        folder.mkdir()
        (folder / "relex.json").write_text(json.dumps(provenance))

    @property
    def steps(self) -> list[int]:
        """Those of the index."""
        index = self.folder / "trajectory" / "index.json"
        return json.loads(index.read_text())["windows"][0]["steps"] if index.exists() else []

    def _write(self, steps: list[int]) -> None:
        (self.folder / "trajectory").mkdir(parents=True, exist_ok=True)
        index = {"base_model": "base", "run": {"project": "p", "experiment": "e"}, "windows": [{"steps": steps}]}
        (self.folder / "trajectory" / "index.json").write_text(json.dumps(index))


class Host:
    """A trainer that validates by a table: probability of a right answer by step, that of the observed weights at `cut`.

    Attributes:
        asked: weights that were validated, in this order; places: on which rows, None for all.
        done: "rest", "restore" and "end", in the order of the calls.
    """

    def __init__(self, quality: dict[int, float], cut: int = CUT, fails: Exception | None = None) -> None:
        self.quality, self.cut, self.fails = quality, cut, fails
        self.asked: list[Prediction | str] = []
        self.metrics: list[str | None] = []
        self.places: list[Collection[int] | None] = []
        self.done: list[str] = []
        self.relex_rewards = {step: 0.1 * step for step in range(1, cut)}

    def relex_validate(
        self, weights: Prediction | str, metric: str | None, timeout: float, places: Collection[int] | None = None
    ) -> Validation:
        self.asked.append(weights)
        self.places.append(places)
        self.metrics.append(metric)
        if self.fails is not None:
            raise self.fails
        target = weights.target if isinstance(weights, Prediction) else self.cut
        nearest = min(self.quality, key=lambda known: abs(known - target))
        hard = torch.rand(len(PROMPTS), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [i for i in range(len(PROMPTS)) if places is None or i in places]
        samples = {PROMPTS[i]: [float(hard[i] < self.quality[nearest])] for i in rows}
        score = sum(one[0] for one in samples.values()) / len(samples)
        return Validation({METRIC: score}, METRIC, samples, 1.0, places={PROMPTS[i]: [i] for i in rows})

    def relex_rest(self) -> None:
        self.done.append("rest")

    def relex_restore(self) -> None:
        self.done.append("restore")

    def relex_end_training(self) -> None:
        self.done.append("end")


def started(
    folder: Path, workers: Workers | None = None, step: int = 0, steps: int = STEPS, **options: Any
) -> tuple[RelexCallback, Workers]:
    """A callback that is ready to train, from the start or from a step that verl resumed from."""
    callback, workers = RelexCallback(*config(folder, **options)), workers or Workers(folder)
    callback.on_length_known(steps)
    callback.on_model_ready(workers)
    callback.on_checkpoint_loaded(step)
    return callback, workers


def train(callback: RelexCallback, first: int, last: int, loggers: dict[str, Any] | None = None) -> None:
    """Steps as verl makes them, up to what comes before the scoring."""
    for step in range(first, last + 1):
        callback.on_step_end(step, SimpleNamespace(logger=loggers or {}))


def report(folder: Path) -> dict[str, Any]:
    """report.json, read by a strict reader."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)
