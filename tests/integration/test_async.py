"""verl's asynchronous trainer modes: observed, cut and scored like the synchronous one."""

from pathlib import Path

import pytest
from harness import run

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(900)]

STEPS, CUT = 5, 2
RELEX = [f"relex.t_cut={CUT}", "relex.targets=[6]", "relex.max_candidates=1", "relex.on_cut=stop"]
METRIC = "val-core/addition/acc/mean@1"
ORDERED = "trainer.v1.sampler.custom_sampler.name=OrderedReplayBufferAsync"
STANDALONE = [
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "trainer.v1.separate_async.parameter_sync_step=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=store",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_cpu.checkpoint_engine",
    "ray_kwargs.ray_init.num_gpus=2",
]


@pytest.mark.parametrize(("option", "extra"), [("colocate_async", []), ("separate_async", STANDALONE)])
def test_scored_and_trained_on(option: str, extra: list[str], tmp_path: Path) -> None:
    """Scored at the first cut, which does not win; at the second one every reward fails while RELEX validates."""
    env = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu,faults", "FAULT_SCORING": "raise", "FAULT_AFTER": "2"}
    env["FAULT_MARKER"] = str(tmp_path / "scoring")
    finished = run(tmp_path, STEPS, env=env, relex=RELEX, option=option, extra=["trainer.test_freq=1", ORDERED, *extra])
    assert finished.code == 0, finished.log[-3000:]
    assert sorted(finished.trained()) == list(range(1, STEPS + 1))
    assert finished.complaints() == []
    report = finished.report()
    (first,) = report["earlier_cuts"]
    assert (first["t_cut"], first["advice"]["action"]) == (CUT, "keep_training")
    held, candidate = first["validation_scores"]
    assert held["score"] == finished.metrics[CUT][METRIC]
    assert finished.metrics[CUT][f"relex/val/relex-step_6/{METRIC}"] == candidate["score"]
    assert report["t_cut"] == 2 * CUT
    assert report["advice"]["action"] == "unscored"
    assert all(METRIC in finished.metrics[step] for step in finished.trained())
    assert (tmp_path / "relex" / "predicted" / "relex-step_6" / "model.safetensors").exists()
