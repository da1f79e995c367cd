"""Jumps in the plain loop, beside what else claims fewer steps: every arm from the same base, questions, rates and seeds.

The questions that are never trained on are halved: on every second one jumps are searched (half of those) and decided (the
other half), by the product's own search and tests; accuracies are of the rest, which nothing sees.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from relex_verl.maths.advice import decides
from relex_verl.maths.extrapolators import Prediction, fit_weights
from relex_verl.maths.harm import judge_jump, judge_undo
from relex_verl.maths.search import search
from relex_verl.maths.window import Window
from relex_verl.trajectory.files import write_json
from study import three_digit
from study.grid import PROMPTS, SAMPLES
from study.grpo import Grpo
from study.peers import RULES
from study.task import Questions, greedy_correct, load_questions
from study.train import Progress, flat_weights

NEAREST = 1.5  # windows; as in the product
CANDIDATES = 6
CONFIDENCE = 0.8
TASKS = {"two-digit": load_questions, "three-digit": three_digit.load_questions}
EMA_LAG = 10


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as the results call it.
        rule: of a step, see `peers.RULES`.
        jump: "" for none, "keep" or "reset" the optimizer at each, "once" for the first only, "reground" without scores.
    """

    name: str
    rule: str = "plain"
    jump: str = ""


ARMS = (
    Arm("plain"),
    Arm("one-shot", jump="once"),
    Arm("jump", jump="keep"),
    Arm("jump-reset", jump="reset"),
    Arm("reground", jump="reground"),
    Arm("sfpo", "sfpo"),
    Arm("gxpo", "gxpo"),
    Arm("sfpo-jump", "sfpo", "keep"),
    Arm("sfpo-open", "sfpo-open"),  # without the gate
    Arm("gxpo-open", "gxpo-open"),
    Arm("sfpo-open-jump", "sfpo-open", "keep"),
)


@dataclass(frozen=True)
class JumpGrid:
    """What is run: every arm at every rate with every seed; at the control rates the plain arm only. A task of `TASKS`."""

    steps: int
    window: int
    score_every: int
    learning_rates: tuple[float, ...]
    controls: tuple[float, ...]
    seeds: tuple[int, ...]
    task: str = "two-digit"

    def runs(self) -> list["JumpRun"]:
        """A whole seed before the next one, the controls last."""
        rates = [(rate, arm) for rate in self.learning_rates for arm in ARMS]
        rates += [(rate, ARMS[0]) for rate in self.controls]
        return [JumpRun(arm, rate, seed) for seed in self.seeds for rate, arm in rates]

    def has(self, path: Path) -> bool:
        """Whether a run is done, as far as this grid trains."""
        last = self.steps - self.steps % self.score_every
        return path.exists() and str(last) in json.loads(path.read_text())["accuracy"]


FULL = JumpGrid(160, 20, 10, (6e-7, 2e-6, 2e-5), (3e-7, 6e-6, 6e-5, 2e-4), (1, 2, 3))
QUICK = JumpGrid(12, 4, 4, (2e-5,), (), (1,))


@dataclass(frozen=True)
class JumpRun:
    """One training run."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lr{self.learning_rate:g}-seed{self.seed}-{self.arm.name}"


class QuestionScores:
    """Right or wrong by question: what the product's tests take."""

    def __init__(self, correct: list[bool]) -> None:
        self.correct = correct

    @cached_property
    def prompts(self) -> dict[str, float]:
        """Question -> 0 or 1."""
        return {f"question {i}": float(one) for i, one in enumerate(self.correct)}

    @property
    def score(self) -> float:
        """Of all."""
        return sum(self.correct) / len(self.correct)

    def searched(self) -> float:
        """Of the half that the search may see."""
        seen = [score for prompt, score in self.prompts.items() if not decides(prompt)]
        return sum(seen) / len(seen)


class Jumper:
    """The window of a run that jumps, and what comes of it at each cut."""

    def __init__(self, training: Grpo, how: str, window: int, test: Questions) -> None:
        self.training, self.how, self.window = training, how, window
        self.asked = test.part(slice(0, None, 2))
        self.horizon, self.scores = NEAREST, 0
        self.kept: tuple[torch.Tensor, dict, QuestionScores, int] | None = None  # weights, optimizer, scores, step
        self.begin(0)

    def begin(self, step: int) -> None:
        """A window begins at the weights as they are."""
        self.origin, self.start, self.deltas = step, flat_weights(self.training), []

    def observe(self) -> None:
        """A row."""
        self.deltas.append(flat_weights(self.training) - self.start)

    def cut(self, step: int) -> dict[str, Any]:
        """What is done at a cut, and a word about it."""
        rows = self._rows()
        if self.how == "reground":  # as many steps ahead as were trained, without a score
            said: dict[str, Any] = {"action": "jump", "target": step + step - self.origin}
            self._set(self._predicted(rows, Prediction("two-point", said["target"])), reset=True)
        else:
            said = self._searched(rows, step)
        self.begin(step)
        return {"step": step, **said}

    def _searched(self, rows: Window, step: int) -> dict[str, Any]:
        here, optimizer = flat_weights(self.training), self.training.optimizer.state_dict()
        hold, spent = self._score(), self.scores
        if self.kept is not None:
            weights, state, before, at = self.kept
            undo = judge_undo(hold, before, step, at, CONFIDENCE)
            self.kept = None
            if undo is not None:
                self.training.set_master(weights)
                self.training.optimizer.load_state_dict(state)
                return {"action": "undo", "scores": 1}
        found: dict[int, QuestionScores] = {}

        def score(method: str, target: int) -> float:
            self.training.set_master(self._predicted(rows, Prediction(method, target)))
            found[target] = self._score()
            return found[target].searched()

        first = self.origin + round(self.horizon * (step - self.origin))
        best = max(
            search(score, ["relex"], [first], step, hold.searched(), CANDIDATES, 0.0, self.origin, NEAREST),
            key=lambda one: one.score,
        )
        self.training.set_master(here)
        prediction = Prediction("relex", best.target)
        advice = judge_jump(prediction, found[best.target], hold, step, CONFIDENCE)
        if advice.action == "jump":
            self.kept = here, _copied(optimizer), hold, step
            self.horizon = max(NEAREST, (best.target - self.origin) / (step - self.origin))
            self._set(self._predicted(rows, prediction), reset=self.how == "reset")
        said = {"action": advice.action, "target": best.target, "score": advice.score, "hold": advice.hold_score}
        return said | {"p_value": advice.p_value, "scores": self.scores - spent + 1}

    def _rows(self) -> Window:
        names, sizes = zip(*((n, t.numel()) for n, t in self.training.master.tensors.items()), strict=True)
        parts = [torch.stack(rows).double() for rows in zip(*(d.split(sizes) for d in self.deltas), strict=True)]
        gram_LTT = torch.stack([rows_Tn @ rows_Tn.T for rows_Tn in parts])
        steps = [self.origin + i + 1 for i in range(len(self.deltas))]
        return Window(list(names), steps, gram_LTT, self.origin)

    def _predicted(self, rows: Window, prediction: Prediction) -> torch.Tensor:
        sizes = [tensor.numel() for tensor in self.training.master.tensors.values()]
        weights_LT = fit_weights(rows, prediction).float()
        moved = [
            sum(a * d for a, d in zip(weights_T.tolist(), deltas, strict=True))
            for weights_T, deltas in zip(
                weights_LT, zip(*(delta.split(sizes) for delta in self.deltas), strict=True), strict=True
            )
        ]
        return self.start + torch.cat(moved)

    def _set(self, weights: torch.Tensor, reset: bool) -> None:
        self.training.set_master(weights)
        if reset:
            self.training.optimizer.state.clear()

    def _score(self) -> QuestionScores:
        self.scores += 1
        return QuestionScores(greedy_correct(self.training.policy, self.asked).tolist())


def _copied(state: dict) -> dict:
    """An optimizer's state as it is now."""
    moments = {key: {name: one.clone() for name, one in of.items()} for key, of in state["state"].items()}
    return {"state": moments, "param_groups": state["param_groups"]}


class Averages:
    """EMA and BEMA of the weights, which only watch: a_t (W_t - W_0) + EMA_t with a_t = (lag + t)^-0.2, and its EMA.

    As TRL's callback has BEMA, but at every step.
    """

    def __init__(self, start: torch.Tensor) -> None:
        self.start, self.average = start, start.clone()

    def watch(self, step: int, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The averages after a step."""
        self.average.lerp_(weights, (EMA_LAG + step) ** -0.5)
        return {"ema": self.average, "bema": self.average + (EMA_LAG + step) ** -0.2 * (weights - self.start)}


def jump_run(run: JumpRun, grid: JumpGrid, base: Path, out: Path, progress: Progress) -> None:
    """Train one run and write `run.json`; one that is there, and as long, is skipped."""
    path = out / run.name / "run.json"
    if grid.has(path):
        progress(grid.steps)
        return
    train, test = TASKS[grid.task](base)
    unseen = test.part(slice(1, None, 2))
    training = Grpo(base, train, run.learning_rate, run.seed)
    rule = RULES[run.arm.rule]
    gate = rule.gate()
    jumper = Jumper(training, run.arm.jump, grid.window, test) if run.arm.jump else None
    averages = Averages(flat_weights(training)) if run.arm.name == "plain" else None

    def accuracy() -> float:
        return greedy_correct(training.policy, unseen).float().mean().item()

    record: dict[str, Any] = {"arm": run.arm.name, "learning_rate": run.learning_rate, "seed": run.seed, "cuts": []}
    record |= {"backward_passes_a_step": rule.backward_passes, "accuracy": {0: accuracy()}, "cost": {0: 0.0}}
    share = len(test.part(slice(0, None, 2)).prompts) / (PROMPTS * SAMPLES)  # of a step's samples, that a score takes
    for step in range(1, grid.steps + 1):
        if gate.closed is None:
            gate.watch(step, rule.step(training))
        else:
            training.step()
        if averages is not None:
            watched = averages.watch(step, flat_weights(training))
        if jumper is not None:
            jumper.observe()
            if step % grid.window == 0 and step < grid.steps:
                record["cuts"].append(jumper.cut(step))
                if run.arm.jump == "once" and record["cuts"][-1]["action"] == "jump":
                    spent, jumper = jumper.scores, None
        if step % grid.score_every == 0:
            scores = jumper.scores if jumper is not None else spent if run.arm.jump else 0
            record["accuracy"][step] = accuracy()  # after a jump, if there was one
            record["cost"][step] = step + scores * share
            if averages is not None:
                here = flat_weights(training)
                for name, weights in watched.items():
                    training.set_master(weights)
                    record.setdefault(name, {})[step] = accuracy()
                training.set_master(here)
        progress(1)
    record["gate"] = {"closed": gate.closed, "values": gate.values}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
