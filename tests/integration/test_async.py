"""verl's asynchronous trainer modes: observed, cut and scored like the synchronous one."""

import pytest
from harness import EXPORT, METRIC, ORDERED, STANDALONE, Run, check_against_dense, checkout, load, run, same_bits

STEPS, CUT = 5, 2
RELEX = [f"relex.t_cut={CUT}", "relex.targets=[6]", "relex.max_candidates=1", "relex.on_cut=stop"]
# colocate_async with FSDP2 whose parameters are bfloat16 themselves: the default trajectory is not to be had.
ROUNDED = ["actor_rollout_ref.actor.fsdp_config.model_dtype=bf16", EXPORT, f"trainer.save_freq={2 * CUT}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Scored at the first cut, which does not win; at the second one every reward fails while RELEX validates."""
    runs = {}
    for mode, strategy, extra in (("colocate_async", "fsdp2", ROUNDED), ("separate_async", "fsdp", STANDALONE)):
        out = tmp_path_factory.mktemp(mode)
        env = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu,faults", "FAULT_SCORING": "raise", "FAULT_AFTER": "2"}
        env["FAULT_MARKER"] = str(out / "scoring")
        extra = ["trainer.test_freq=1", ORDERED, *extra]
        runs[mode] = run(out, STEPS, env=env, strategy=strategy, relex=RELEX, option=mode, extra=extra)
    return runs


@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_scored_and_trained_on(mode: str, finished: dict[str, Run]) -> None:
    one = finished[mode]
    assert one.code == 0, one.log[-3000:]
    assert sorted(one.trained()) == list(range(1, STEPS + 1))
    assert one.complaints() == []
    report = one.report()
    (first,) = report["earlier_cuts"]
    assert (first["t_cut"], first["advice"]["action"]) == (CUT, "keep_training")
    held, candidate = first["validation_scores"]
    assert held["score"] == one.metrics[CUT][METRIC]
    assert one.metrics[CUT][f"relex/val/relex-step_6/{METRIC}"] == candidate["score"]
    assert report["t_cut"] == 2 * CUT
    assert report["advice"]["action"] == "unscored"
    assert all(METRIC in one.metrics[step] for step in one.trained())
    assert (one.out / "relex" / "predicted" / "relex-step_6" / "model.safetensors").exists()


def test_bfloat16_parameters_fall_back_to_bf16_rows_and_say_why(finished: dict[str, Run]) -> None:
    one = finished["colocate_async"]
    said = [line for line in one.log.splitlines() if "relex.trajectory=fp32 becomes bf16" in line]
    assert len(said) == 1
    assert "the engine's parameters are torch.bfloat16" in said[0]
    assert "2 rows of bf16, 3% of the weights changing a step: about" in one.log
    check_against_dense(one, steps=[1, 2, 3, 4], targets=[6])
    export = one.out / "checkpoints" / f"global_step_{2 * CUT}" / "actor" / "huggingface"
    same_bits(checkout(one, 2 * CUT), load(export))
