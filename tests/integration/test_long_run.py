"""Three hundred steps of verl's trainer with jumps, killed and resumed three times, against the same run left alone.

Too long for every commit, so it is asked for: RELEX_LONG_RUN=1 bash tests/run.sh tests/integration/test_long_run.py
"""

import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from harness import SHARDS, Run, kill_as_soon_as, run

from relex_verl.trajectory.store import Trajectory

STEPS, WINDOW, SAVED = 300, 20, 35
OPTIONS: dict[str, Any] = {
    "timeout": 7200,
    "relex": [
        *("relex.on_cut=jump", f"relex.t_cut={WINDOW}", "relex.observe_every=1", "relex.max_candidates=3"),
        "relex.jump_kl_max=1",
    ],
    "extra": [
        SHARDS,
        "actor_rollout_ref.actor.optim.lr=2e-6",
        f"trainer.save_freq={SAVED}",
        "trainer.resume_mode=auto",
    ],
}
# When the node dies, by a file: steps after two cuts that verl's last checkpoint (35) has not seen; as soon as the window
# after the cut at 140 begins, in whose checkpoint its jump is not; and right after the checkpoint at 280, before its scores.
DEATHS = [
    "relex/trajectory/window_003/rank_00000/step_000063.safetensors",
    "relex/trajectory/window_007/rank_00000/origin.safetensors",
    "checkpoints/global_step_280/data.pt",
]

pytestmark = [
    pytest.mark.timeout(4 * 3600),
    pytest.mark.skipif("RELEX_LONG_RUN" not in os.environ, reason="takes half an hour: ask for it by RELEX_LONG_RUN=1"),
]


def actions(finished: Run) -> dict[int, str]:
    """What was done at each cut."""
    report = finished.report()
    return {cut["t_cut"]: cut["advice"]["action"] for cut in (*report["earlier_cuts"], report)}


def saved(finished: Run) -> dict[str, bytes]:
    """Every tensor of weights and optimizer in verl's last checkpoint, as it is stored."""
    content, folder = {}, finished.out / "checkpoints" / f"global_step_{STEPS}" / "actor"
    for file in (*sorted(folder.glob("model_*.pt")), *sorted(folder.glob("optim_*.pt"))):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if "/data/" in name:
                    content[f"{file.name}: {name.split('/', 1)[1]}"] = archive.read(name)
    return content


def observed(finished: Run) -> dict[str, bytes]:
    """Every file of the trajectory's windows."""
    folder = finished.out / "relex" / "trajectory"
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("window_*/*/*.safetensors"))
    }


def test_a_run_that_was_killed_three_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    began = time.monotonic()
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    alone = run(plain, STEPS, **OPTIONS)
    assert alone.code == 0, alone.log[-3000:]
    took = [time.monotonic() - began]
    for sign in DEATHS:
        kill_as_soon_as(killed / sign, killed, STEPS, **OPTIONS)
        took.append(time.monotonic() - began)
    finished = run(killed, STEPS, **OPTIONS)
    assert finished.code == 0, finished.log[-3000:]
    took.append(time.monotonic() - began)
    print(f"\nat each cut: {actions(alone)}\nseconds after each run: {[round(one) for one in took]}")

    assert not alone.complaints() + finished.complaints()
    assert list(actions(alone)) == list(range(WINDOW, STEPS, WINDOW))
    assert list(actions(alone).values()).count("jump") >= 3  # else nothing is tested
    assert actions(finished) == actions(alone)
    assert list(finished.trained()) == list(range(281, STEPS + 1))
    assert finished.trained() == {step: values for step, values in alone.trained().items() if step > 280}
    windows = [
        [
            (one.origin_step, one.steps, one.jump, one.undone)
            for one in Trajectory(path / "relex/trajectory").index.windows
        ]
        for path in (plain, killed)
    ]
    assert windows[0] == windows[1]
    ours, theirs = observed(finished), observed(alone)
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
    assert ours.keys() == theirs.keys()
    ours, theirs = saved(finished), saved(alone)
    assert any(name.startswith("optim_") for name in theirs)
    assert [name for name in theirs if ours.get(name) != theirs[name]] == []
    assert ours.keys() == theirs.keys()
