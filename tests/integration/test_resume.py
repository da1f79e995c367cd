"""A run killed after a verl checkpoint goes on observing; what the checkpoint did not see is forgotten."""

from pathlib import Path

from harness import CUT, EXPORT, Run, check_against_dense, checkout, different, kill_as_soon_as, load, run, same_bits

STEPS, SAVED = 6, 3
RELEX = [f"relex.t_cut={STEPS}", "relex.targets=[12]", "relex.trajectory=bf16", "relex.validate_targets=false"]
OPTIONS = {
    "strategy": "fsdp2",
    "ranks": 2,
    "relex": RELEX,
    "extra": [EXPORT, f"trainer.save_freq={SAVED}", "trainer.resume_mode=auto"],
}


def test_resume(tmp_path: Path, two_ranks: Run) -> None:
    """FSDP2 on two ranks, rows of bf16: killed as soon as a step beyond the checkpoint has been observed."""
    rows = tmp_path / "relex" / "trajectory" / "window_000"
    kill_as_soon_as(rows / "rank_00001" / f"step_{SAVED + 1:06d}.safetensors", tmp_path, STEPS, **OPTIONS)
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(SAVED)
    before = {path: path.read_bytes() for path in rows.rglob("step_00000[123].*")}
    finished = run(tmp_path, STEPS, **OPTIONS)
    assert finished.code == 0, finished.log[-3000:]
    assert f"goes on after step {SAVED}, with {SAVED} observed steps" in finished.log
    assert len(before) == 2 * SAVED
    assert all(path.read_bytes() == content for path, content in before.items())
    check_against_dense(finished, steps=[1, 2, 3, 4, 5, 6], targets=[12])
    same_bits(checkout(finished, STEPS), load(tmp_path / "checkpoints" / f"global_step_{STEPS}" / "actor/huggingface"))
    assert (tmp_path / "relex" / "predicted" / "relex-step_12" / "relex.json").exists()
    # FSDP1 trains the same, and nobody killed it: the same weights but for what float32 rows leave out.
    uninterrupted = {name: tensor.bfloat16() for name, tensor in checkout(two_ranks, CUT).items()}
    assert different(checkout(finished, CUT), uninterrupted) <= 1e-2
