"""Train one run, record its prefix through the product's `Observer`, keep the true weights at the targets."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.kinds import KINDS
from study.grid import Grid, Run
from study.grpo import Grpo
from study.task import Questions, greedy_correct, load_questions

Progress = Callable[[int], None]


class Recorder:
    """All arms' trajectories of one run: observers that take their rows side by side."""

    def __init__(self, folder: Path, base: Path, run: Run, grid: Grid, source: Grpo) -> None:
        self.source, self.cut = source.master, grid.cuts[-1]
        self.changed_shares: dict[str, list[float]] = {}
        self.plans: dict[str, tuple[Observer, int, int]] = {}  # name -> observer, spacing, last step
        for arm in grid.arms(run):
            for name, (spacing, last) in grid.rows(arm).items():
                identity = {"learning_rate": run.learning_rate, "seed": run.seed}
                observer = Observer(folder / name, str(base), {}, identity, KINDS[arm.encoding])
                observer.start(self.source)
                observer.open(0)
                self.plans[name] = (observer, spacing, last)

    def observe(self, step: int) -> None:
        """Take the rows that are due after this step."""
        for name, (observer, spacing, last) in self.plans.items():
            if step <= last and (step % spacing == 0 or step == last):
                share = observer.observe(step, self.source).changed_share
                if share == share:  # a sketch does not know
                    self.changed_shares.setdefault(name, []).append(share)
                if step in (last, self.cut):
                    observer.save()


def save_weights(folder: Path, step: int, training: Grpo) -> None:
    """Keep the float32 master weights of a step."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach() for name, tensor in training.master.tensors.items()}
    save_file(weights, folder / f"step_{step:06d}.safetensors")


def load_weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """What `save_weights` kept."""
    return load_file(folder / f"step_{step:06d}.safetensors")


def flat_weights(training: Grpo) -> torch.Tensor:
    """All master weights end to end, a copy."""
    return torch.cat([tensor.detach().flatten() for tensor in training.master.tensors.values()])


def save_states(path: Path, states: list[torch.Tensor], training: Grpo) -> None:
    """Keep the float32 weights of every step from 0 on, (steps + 1, n) a tensor."""
    sizes = [tensor.numel() for tensor in training.master.tensors.values()]
    parts = zip(*(state.split(sizes) for state in states), strict=True)
    save_file({name: torch.stack(list(part)) for name, part in zip(training.master.tensors, parts, strict=True)}, path)


def train_run(run: Run, grid: Grid, base: Path, out: Path, progress: Progress) -> None:
    """The run, its recorded prefix and its controls; a finished run is skipped.

    Args:
        run: learning rate and seed.
        grid: the study.
        base: folder of the base model.
        out: the run's folder is made below it.
        progress: called with the number of training steps done since the last call.
    """
    folder = out / run.name
    if (folder / "run.json").exists():
        progress(planned_steps(grid))
        return
    shutil.rmtree(folder, ignore_errors=True)
    train, test = load_questions(base)
    training = Grpo(base, train, run.learning_rate, run.seed)
    recorder = Recorder(folder / "trajectories", base, run, grid, training)
    states = [flat_weights(training)] if grid.is_yardstick(run) else []
    checkpoints = grid.checkpoints()
    rewards, correct = [], {0: greedy_correct(training.policy, test)}
    for step in range(1, grid.steps + 1):
        rewards.append(training.step())
        recorder.observe(step)
        if states:
            states.append(flat_weights(training))
        if step in checkpoints:
            save_weights(folder / "weights", step, training)
            correct[step] = greedy_correct(training.policy, test)
        progress(1)
    if states:
        save_states(folder / "states.safetensors", states, training)
    del states
    controls = {cut: train_control(run, grid, cut, base, train, test, progress) for cut in grid.cuts}
    record = {
        "accuracy": {step: one.float().mean().item() for step, one in correct.items()},
        "accuracy_select": {step: one[::2].float().mean().item() for step, one in correct.items()},
        "accuracy_report": {step: one[1::2].float().mean().item() for step, one in correct.items()},
        "control": controls,
        "rewards": rewards,
        "changed_shares": recorder.changed_shares,
    }
    write_json(folder / "run.json", record)


def train_control(
    run: Run, grid: Grid, cut: int, base: Path, train: Questions, test: Questions, progress: Progress
) -> float:
    """Test accuracy after only `cut` steps, the learning rate multiplied by the horizon (steps / cut)."""
    training = Grpo(base, train, run.learning_rate * grid.steps / cut, run.seed)
    for _ in range(cut):
        training.step()
        progress(1)
    return greedy_correct(training.policy, test).float().mean().item()


def planned_steps(grid: Grid) -> int:
    """Training steps of one run with its controls."""
    return grid.steps + sum(grid.cuts)


def read_record(out: Path, run: Run) -> dict:
    """What `train_run` wrote; steps are strings, as JSON has them."""
    return json.loads((out / run.name / "run.json").read_text())
