"""Runs verl's real trainer on the CPU through the quickstart's glue, small, and reads back what it left."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from shell import call

from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart"
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(RECIPE))

import base_model  # noqa: E402
import data  # noqa: E402
import training  # noqa: E402
from schedule import Schedule  # noqa: E402

BASE = Path(os.environ.get("TEST_BASE") or RECIPE / ".cache" / "base")
PROMPTS = 8
SAMPLES = 4
VALIDATION_PROMPTS = 64
METRIC = "val-core/addition/acc/mean@1"
# The runs that are compared with one another.
STEPS, CUT, TARGETS = 6, 4, [6, 12]
RELEX = [f"relex.t_cut={CUT}", f"relex.targets={TARGETS}", "relex.max_candidates=2", f"relex.score_metric={METRIC}"]
# What verl's checkpoints hold: with its Hugging Face export, and without.
EXPORT = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]"
SHARDS = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]"
# What the asynchronous modes need: batches in one order, and of separate_async replicas of their own.
ORDERED = "trainer.v1.sampler.custom_sampler.name=OrderedReplayBufferAsync"
STANDALONE = [
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "trainer.v1.separate_async.parameter_sync_step=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=store",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_cpu.checkpoint_engine",
    "ray_kwargs.ray_init.num_gpus=2",
]
TRAINED = (
    "critic/score/mean",
    "critic/rewards/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "actor/entropy",
    "response_length/mean",
)

starts: list[str] = []
"""The folder of every start of the trainer, counted in conftest.py."""


@dataclass(frozen=True)
class Run:
    """A finished (or killed) run.

    Attributes:
        out: its folder; RELEX's is `relex` in it.
        code: exit status.
        log: what it printed.
    """

    out: Path
    code: int
    log: str

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """step -> everything that verl's file logger got."""
        return dict(training.read_metrics(self.out))

    def trained(self) -> dict[int, dict[str, float]]:
        """step -> what training alone decides: rewards, losses, gradient norms."""
        return {
            step: {name: values[name] for name in TRAINED if name in values}
            for step, values in self.metrics.items()
            if "actor/grad_norm" in values
        }

    def report(self) -> dict[str, Any]:
        """RELEX's report.json."""
        return json.loads((self.out / "relex" / "report.json").read_text())

    def complaints(self) -> list[str]:
        """Lines by which RELEX says that it failed."""
        return re.findall(r"RELEX failed and is switched off.*", self.log)


def command(
    out: Path,
    steps: int,
    strategy: str = "fsdp",
    ranks: int = 1,
    relex: Sequence[str] | None = (),
    extra: Sequence[str] = (),
    option: str = "default",
    rollout: str = "cpu",
) -> list[str]:
    """The command line of a small run; `relex=None` leaves RELEX out, `option` chooses the mode."""
    base_model.build(BASE)
    files = data.write(out / "data")
    schedule = Schedule(steps, steps, (2 * steps,), full=True)
    plain = [
        one
        for one in training.overrides(schedule, BASE, files, out, ranks, strategy, rollout)
        if not one.startswith(("+relex", "relex."))
    ]
    small = [
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={PROMPTS * SAMPLES // ranks}",
        f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu={PROMPTS * SAMPLES // ranks}",
        f"data.val_max_samples={VALIDATION_PROMPTS}",
        "trainer.val_before_train=False",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "actor_rollout_ref.actor.optim.lr=1e-5",
    ]
    ours = [] if relex is None else [f"+relex={option}", f"relex.output_dir={out / 'relex'}", *relex]
    if relex is not None:
        ours.append("relex.max_overhead=null")  # steps of a second, on a machine that others may use
    return [sys.executable, "-m", "verl.trainer.main_ppo", *plain, *small, *ours, *extra]


def environment(out: Path, rollout: str = "cpu", **more: str) -> dict[str, str]:
    """The quickstart's environment, with this folder's modules importable in every worker."""
    env = training.environment(out, rollout)
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), env["PYTHONPATH"]])
    (out / "wandb").mkdir(parents=True, exist_ok=True)
    return {**env, **more}


def run(out: Path, steps: int, env: dict[str, str] | None = None, timeout: int = 600, **options: Any) -> Run:
    """Run to the end."""
    line = command(out, steps, **options)
    starts.append(out.name)
    with open(out / "log.txt", "a") as log:
        done = subprocess.run(
            line,
            cwd=out,
            env=environment(out, options.get("rollout", "cpu"), **(env or {})),
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    return Run(out, done.returncode, (out / "log.txt").read_text(errors="replace"))


def kill_as_soon_as(
    sign: Path, out: Path, steps: int, env: dict[str, str] | None = None, timeout: int = 500, **options: Any
) -> None:
    """Start a run, and kill it when a file is there: all of its processes at once, as when a node dies."""
    line, printed = command(out, steps, **options), out / "killed.txt"
    starts.append(f"{out.name} (killed)")
    with open(printed, "w") as log:
        process = subprocess.Popen(line, cwd=out, env=environment(out, **(env or {})), stdout=log, stderr=log)
        deadline = time.monotonic() + timeout
        while not sign.exists():
            assert process.poll() is None, printed.read_text()[-3000:]
            assert time.monotonic() < deadline, f"{sign} did not come: {printed.read_text()[-3000:]}"
            time.sleep(0.05)
        # The driver, Ray's daemons, the ranks.
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait()


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def relex_verl(*arguments: str) -> str:
    """The installed command; its output."""
    script = Path(sys.executable).parent / "relex-verl"
    return subprocess.run([script, *arguments], capture_output=True, text=True, check=True).stdout


def checkout(run: Run, step: int) -> dict[str, torch.Tensor]:
    """The weights of an observed step, by the command, in this process: starting it costs seconds."""
    folder = run.out / f"checkout-{step}"
    if not folder.exists():
        done = call("checkout", run.out / "relex" / "trajectory", "--step", step, "--out", folder)
        assert done.exit_code == 0, done.output
    return load(folder)


def merged(actor: Path) -> Path:
    """verl's own Hugging Face export of a sharded checkpoint, in bfloat16."""
    arguments = ["merge", "--backend", "fsdp", "--local_dir", str(actor), "--target_dir", str(actor / "merged")]
    subprocess.run(
        [sys.executable, "-m", "verl.model_merger", *arguments], check=True, capture_output=True, timeout=300
    )
    return actor / "merged"


def predicted(run: Run, target: int) -> dict[str, torch.Tensor]:
    """The predicted checkpoint of a step."""
    return load(run.out / "relex" / "predicted" / f"relex-step_{target}")


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of the elements in which two checkpoints differ."""
    return sum(int((one[name] != other[name]).sum()) for name in one) / sum(tensor.numel() for tensor in one.values())


def same_bits(ours: dict[str, torch.Tensor], export: dict[str, torch.Tensor]) -> None:
    """Check that a bfloat16 checkpoint is an export, rounded."""
    assert ours.keys() == export.keys()
    for name, tensor in export.items():
        assert torch.equal(ours[name].view(torch.int16), tensor.bfloat16().view(torch.int16)), name


def dense_svd_prediction(
    states: list[dict[str, torch.Tensor]], steps: list[int], target: int
) -> dict[str, torch.Tensor]:
    """Paper, Algorithm 2, over theta_0 and the checkouts of all observed steps, in float64."""
    weights = {}
    for name, origin in states[0].items():
        deltas = torch.stack([(state[name].double() - origin.double()).flatten() for state in states[1:]])
        left, sigma, right = torch.linalg.svd(deltas, full_matrices=False)
        times = torch.tensor(steps, dtype=torch.float64)
        design = torch.stack([times, torch.ones_like(times)], 1)
        slope, intercept = torch.linalg.lstsq(design, (left[:, 0] * sigma[0]).unsqueeze(1)).solution.flatten()
        weights[name] = (origin.double() + ((slope * target + intercept) * right[0]).view_as(origin)).bfloat16()
    return weights


def check_against_dense(
    run: Run, steps: list[int], targets: list[int], gram_error: float = 1e-12, wrong_share: float = 1e-5
) -> None:
    """Gram matrix and predictions are those of a dense SVD over the checkouts of all observed steps."""
    assert run.code == 0, run.log[-3000:]
    trajectory = Trajectory(run.out / "relex" / "trajectory")
    assert trajectory.steps == steps
    states = [checkout(run, step) for step in (0, *steps)]
    gram = replay.window(trajectory).gram_LTT
    for i, name in enumerate(trajectory.names):
        deltas = torch.stack([(s[name].double() - states[0][name].double()).flatten() for s in states[1:]])
        expected = deltas @ deltas.T
        torch.testing.assert_close(gram[i], expected, rtol=gram_error, atol=gram_error * float(expected.abs().max()))
    for target in targets:
        expected_weights, written = dense_svd_prediction(states, steps, target), predicted(run, target)
        assert written.keys() == expected_weights.keys()
        assert different(written, expected_weights) <= wrong_share
