"""verl's asynchronous trainer modes: observed, cut and scored like the synchronous one."""

from pathlib import Path

import pytest
from harness import run

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(900)]

RELEX = ["relex.t_cut=3", "relex.targets=[6]", "relex.max_candidates=1"]
STANDALONE = [
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.n_gpus_per_node=1",
    "trainer.v1.separate_async.parameter_sync_step=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=store",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_cpu.checkpoint_engine",
    "ray_kwargs.ray_init.num_gpus=2",
]


@pytest.mark.parametrize(("option", "extra"), [("colocate_async", []), ("separate_async", STANDALONE)])
def test_scored_at_the_cut_and_trained_on(option: str, extra: list[str], tmp_path: Path) -> None:
    finished = run(tmp_path, 4, relex=RELEX, option=option, extra=["trainer.test_freq=3", *extra])
    assert finished.code == 0, finished.log[-3000:]
    assert len(finished.trained()) == 4
    assert finished.complaints() == []
    held, candidate = finished.report()["validation_scores"]
    metric = "val-core/addition/acc/mean@1"
    assert held["score"] == finished.metrics[3][metric]
    assert finished.metrics[3][f"relex/val/relex-step_6/{metric}"] == candidate["score"]
    assert (tmp_path / "relex" / "predicted" / "relex-step_6" / "model.safetensors").exists()
