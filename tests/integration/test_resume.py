"""A run killed after a verl checkpoint goes on observing; what the checkpoint did not see is forgotten."""

import contextlib
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from harness import checkout, command, environment, run

from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(1200)]

RELEX = ["relex.t_cut=6", "relex.targets=[12]", "relex.trajectory=bf16", "relex.validate_targets=false"]
SAVED = 3
EXTRA = [f"trainer.save_freq={SAVED}", "trainer.resume_mode=auto"]


def kill_after(out: Path, step: int) -> None:
    """Start a run and kill all of its processes as soon as a step beyond the checkpoint has been observed."""
    line = command(out, 6, strategy="fsdp2", ranks=2, relex=RELEX, extra=EXTRA)
    with open(out / "killed.txt", "w") as log:
        process = subprocess.Popen(line, cwd=out, env=environment(out), stdout=log, stderr=log)
        last = out / "relex" / "trajectory" / "window_000" / "rank_00001" / f"step_{step:06d}.safetensors"
        deadline = time.monotonic() + 500
        while not last.exists():
            assert process.poll() is None, (out / "killed.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Everything at once, as when a node dies: the driver, Ray's daemons, the ranks.
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.wait()


def test_resume(tmp_path: Path) -> None:
    kill_after(tmp_path, SAVED + 1)
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(SAVED)
    before = {path: path.read_bytes() for path in (tmp_path / "relex" / "trajectory").rglob("step_00000[123].*")}
    finished = run(tmp_path, 6, strategy="fsdp2", ranks=2, relex=RELEX, extra=EXTRA)
    assert finished.code == 0, finished.log[-3000:]
    assert f"goes on after step {SAVED}, with {SAVED} observed steps" in finished.log
    assert len(before) == 2 * SAVED
    assert all(path.read_bytes() == content for path, content in before.items())
    trajectory = Trajectory(tmp_path / "relex" / "trajectory")
    assert trajectory.steps == [1, 2, 3, 4, 5, 6]
    states = [checkout(finished, step) for step in range(7)]
    gram = replay.window(trajectory).gram_LTT
    for i, name in enumerate(trajectory.names):
        deltas = torch.stack([(state[name].double() - states[0][name].double()).flatten() for state in states[1:]])
        expected = deltas @ deltas.T
        torch.testing.assert_close(gram[i], expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    assert (tmp_path / "relex" / "predicted" / "relex-step_12" / "relex.json").exists()
