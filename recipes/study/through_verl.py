"""Jumps through verl's own trainer, beside plain runs of the same rates and seeds: the quickstart's base, task and batch.

Of the 512 questions that are never trained on, every second one is the run's validation set: half of those the search
sees, and on the other half it is decided. The rest is seen by nothing, and is what the accuracies are of.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import training
from addition import split
from data import files, rows
from safetensors.torch import load_file
from schedule import Schedule
from transformers import Qwen2ForCausalLM

from relex_verl.trajectory import replay
from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.holding import window_holding
from relex_verl.trajectory.store import Trajectory
from study.task import Questions, greedy_correct, load_model, load_questions

WINDOW = 20
CANDIDATES = 5
SCORE_EVERY = 5
JUMP_STEPS = 5 * WINDOW + 1  # one more than the last cut: a run jumps only where steps follow
PLAIN_STEPS = {6e-7: 200, 2e-6: 160, 2e-5: 100}
SEEDS = (1, 2, 3)
SAMPLES_A_STEP = training.PROMPTS_PER_STEP * training.SAMPLES_PER_PROMPT


@dataclass(frozen=True)
class VerlRun:
    """One run of verl's trainer."""

    learning_rate: float
    seed: int
    jump: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lr{self.learning_rate:g}-seed{self.seed}-{'jump' if self.jump else 'plain'}"

    @property
    def steps(self) -> int:
        """How far it trains."""
        return JUMP_STEPS if self.jump else PLAIN_STEPS[self.learning_rate]


def queue() -> list[VerlRun]:
    """Every run, a whole learning rate before the next one; the two of a seed one after the other."""
    return [VerlRun(rate, seed, jump) for rate in PLAIN_STEPS for seed in SEEDS for jump in (False, True)]


def overrides(run: VerlRun, base: Path, folder: Path) -> list[str]:
    """The quickstart's; of a plain run without RELEX."""
    schedule = Schedule(run.steps, WINDOW, (run.steps + 1,), full=True, jump=run.jump)
    options = training.overrides(schedule, base, files(folder / "data"), folder, 1, "fsdp")
    if not run.jump:
        options = [option for option in options if not option.lstrip("+").startswith("relex")]
    options += [
        f"actor_rollout_ref.actor.optim.lr={run.learning_rate}",
        f"data.seed={run.seed}",
        f"actor_rollout_ref.rollout.seed={run.seed}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.logger=[console,file]",
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        f"trainer.save_freq={-1 if run.jump else SCORE_EVERY}",
    ]
    if run.jump:
        options += ["relex.observe_every=1", f"relex.max_candidates={CANDIDATES}"]
    return options


def write_data(folder: Path) -> None:
    """All training questions; every second of the others as the validation set."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = split()
    for path, pairs in zip(files(folder), (train, test[::2]), strict=True):
        pd.DataFrame(rows(pairs)).to_parquet(path)


def train(run: VerlRun, base: Path, folder: Path) -> None:
    """verl's trainer, start to end.

    Raises:
        RuntimeError: it failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "data")
    environment = training.environment(folder) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(run, base, folder)]
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=False)
    if done.returncode:
        raise RuntimeError(f"verl's trainer failed; all of it: {folder / 'log.txt'}")


class Scorer:
    """Greedy accuracy of weights on the questions that nothing has seen, and on the run's validation set."""

    def __init__(self, base: Path) -> None:
        self.model: Qwen2ForCausalLM = load_model(base)
        self.questions: Questions = load_questions(base)[1]

    @torch.no_grad()
    def score(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Rounded to bfloat16, as verl's rollout has them."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name].view(parameter.shape))
        correct = greedy_correct(self.model, self.questions).float()
        return {"unseen": correct[1::2].mean().item(), "validation": correct[::2].mean().item()}


def plain_record(folder: Path, scorer: Scorer) -> dict:
    """Accuracies by step, from verl's checkpoints, which are then deleted."""
    accuracy = {}
    checkpoints = folder / "checkpoints"
    for path in sorted(checkpoints.glob("global_step_*/actor/huggingface/model.safetensors")):
        accuracy[int(path.parents[2].name.removeprefix("global_step_"))] = scorer.score(load_file(path))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {"accuracy": dict(sorted(accuracy.items()))}


def jump_record(folder: Path, scorer: Scorer) -> dict:
    """Accuracies by step from the trajectory; at a cut also of what training went on with, and what the cut spent."""
    report = json.loads((folder / "relex" / "report.json").read_text())
    trajectory = Trajectory(folder / "relex" / "trajectory")
    observed = [step for window in trajectory.windows for step in window.steps]

    def score(step: int, after: bool = False) -> dict[str, float]:
        opened = window_holding(trajectory, step, after)
        states = replay.origins(opened) if after else replay.states(opened, step)
        return scorer.score({shard.name: shard.data for shard in states})

    cuts = []
    for cut in (*report["earlier_cuts"], report):
        advice, scored = cut["advice"], cut["validation_scores"]
        changed = advice["action"] in ("jump", "undo")
        after = score(cut["t_cut"], after=True) if changed else None
        told = {key: advice[key] for key in ("action", "score", "hold_score", "p_value", "reason")}
        target = None if advice["target"] is None else advice["target"]
        curve = [[one["target"], one["search_score"], one["score"]] for one in scored]
        spent = {"scores": len(scored), "samples": sum(one["prompts"] for one in scored)}
        spent["seconds"] = sum(one["seconds"] for one in scored)
        cuts.append({"step": cut["t_cut"], **told, "target": target, "after": after, **spent, "curve": curve})
    wanted = [step for step in observed if step % SCORE_EVERY == 0]
    return {"accuracy": {step: score(step) for step in wanted}, "cuts": cuts}


def measure(run: VerlRun, base: Path, out: Path, scorer: Scorer) -> None:
    """Train, score, write `run.json`; what is there already is not done again."""
    folder = (out / run.name).absolute()
    if (folder / "run.json").exists():
        return
    started = time.perf_counter()
    train(run, base, folder)
    record = {"learning_rate": run.learning_rate, "seed": run.seed, "jump": run.jump, "steps": run.steps}
    record |= {"seconds": time.perf_counter() - started, "samples_a_step": SAMPLES_A_STEP}
    seconds = {step: logged.get("timing_s/step") for step, logged in training.read_metrics(folder)}
    record["step_seconds"] = seconds
    record |= (jump_record if run.jump else plain_record)(folder, scorer)
    write_json(folder / "run.json", record)


def run_queue(runs: Sequence[VerlRun], base: Path, out: Path) -> None:
    """One run at a time; a run that is done is skipped, one that was broken off is begun anew."""
    scorer = Scorer(base)
    for run in runs:
        measure(run, base, out, scorer)
        print(f"verl, {run.name}: done", flush=True)
