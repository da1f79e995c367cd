"""A run that jumps, in verl's real trainer: killed after the jump, and resumed from the checkpoint before it."""

from pathlib import Path

import torch
from harness import Run, checkout, kill_as_soon_as, run

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.prediction import predicted_tensors
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

STEPS, WINDOW, JUMP = 10, 3, 6
OPTIONS = {
    "relex": [
        *("relex.on_cut=jump", f"relex.t_cut={WINDOW}", "relex.observe_every=1", "relex.max_candidates=3"),
        "relex.jump_kl_max=10",
    ],
    # Large steps: of the two cuts that come, the first has no winner and the second one has.
    "extra": ["actor_rollout_ref.actor.optim.lr=2e-5", f"trainer.save_freq={JUMP}", "trainer.resume_mode=auto"],
}


def actions(finished: Run) -> dict[int, str]:
    """What was done at each cut."""
    report = finished.report()
    return {cut["t_cut"]: cut["advice"]["action"] for cut in (*report["earlier_cuts"], report)}


def test_a_killed_run_makes_its_jump_again_and_trains_on_as_it_would_have(tmp_path: Path) -> None:
    trajectory = tmp_path / "relex" / "trajectory"
    row = trajectory / "window_002" / "rank_00000" / "step_000008.safetensors"
    kill_as_soon_as(row, tmp_path, STEPS, **OPTIONS)
    before = Run(tmp_path, -9, "")
    assert actions(before) == {3: "keep_training", 6: "jump"}
    metrics = before.metrics
    assert metrics[6]["relex/jump/made"] == 1.0
    assert metrics[3]["relex/jump/made"] == 0.0
    assert 0 < metrics[6]["relex/jump/kl"] < 10
    assert "relex/jump/kl" not in metrics[3]
    origin = trajectory / "window_002" / "rank_00000" / "origin.safetensors"
    kept = origin.read_bytes()
    trained = before.trained()[7]

    finished = run(tmp_path, STEPS, **OPTIONS)
    assert finished.code == 0, finished.log[-3000:]
    assert not finished.complaints()
    assert f"a window begins at step {JUMP}; the jump of step {JUMP} is made again" in finished.log
    assert finished.trained()[7] == trained
    assert list(finished.trained()) == [7, 8, 9, 10]
    assert origin.read_bytes() == kept
    windows = Trajectory(trajectory).index.windows
    rows = [(window.origin_step, window.steps) for window in windows[:3]]
    assert rows == [(0, [1, 2, 3]), (3, [4, 5, 6]), (6, [7, 8, 9])]

    # What was trained on from is the prediction from the window before, to the last bit.
    window, jump = Trajectory(trajectory, 1), windows[2].jump
    assert jump is not None
    prediction = Prediction(jump["method"], jump["target"], jump["rank"], jump["fit_from"])
    expected = predicted_tensors(
        replay.histories(window), window.kind, replay.window(window), prediction, dtype=torch.float32
    )
    jumped = {shard.name: shard.data for shard in replay.origins(Trajectory(trajectory, 2))}
    for shard in expected:
        assert torch.equal(jumped[shard.name], shard.data), shard.name
    observed = checkout(finished, JUMP)  # and the weights before it come back, too
    assert any(not torch.equal(observed[name].flatten(), jumped[name]) for name in jumped)
