"""verl's own vLLM rollout, on a CPU: the server, abort, sleep, weight transfer and validation are verl's and vLLM's.

verl compares the probabilities of each step's samples in the rollout with the trainer's: `rollout_probs_diff_mean` is under
0.01 where the rollout has the policy's weights, and many times that where it has others.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import METRIC, ORDERED, STANDALONE, Run, run

if find_spec("vllm") is None:
    cure = "bash recipes/install.sh --rollout vllm, then .venv-vllm/bin/python -m pytest tests/integration/vllm_rollout"
    pytest.skip(f"no vLLM here: {cure}", allow_module_level=True)

CUT = 2
RELEX = [f"relex.t_cut={CUT}", "relex.targets=[60]", "relex.max_candidates=1", "relex.observe_every=1"]
SAME, OTHER = 0.02, 0.05
"""At most, of a rollout with the policy's weights; at least, of one with others."""


def with_vllm(out: Path, steps: int, relex: list[str], faults: dict[str, Any], **options: Any) -> Run:
    """Train to the end, as far as it goes; the faults are those of faults.py."""
    env = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu,verl_cpu_vllm,faults", "FAULT_MARKER": str(out / "scoring")}
    env |= {f"FAULT_{name.upper()}": str(value) for name, value in faults.items()}
    return run(out, steps, env=env, rollout="vllm", relex=[*RELEX, *relex], **options)


def difference(finished: Run) -> dict[int, float]:
    """Step -> how far the probabilities in the rollout are from the trainer's."""
    return {step: values["training/rollout_probs_diff_mean"] for step, values in finished.metrics.items()}


def trained(finished: Run, steps: int) -> None:
    """Check that it went to its last step and that RELEX has not failed."""
    assert finished.code == 0, finished.log[-3000:]
    assert sorted(finished.trained()) == list(range(1, steps + 1))
    assert finished.complaints() == []


def test_after_a_scoring_the_policys_weights_are_back(tmp_path: Path) -> None:
    """FSDP1. Not so after the second cut, on purpose, or the figure would show nothing; the third scores NaN."""
    faults = {"scoring": "nan", "after": 4, "unrestored": 2 * CUT}
    finished = with_vllm(tmp_path, 7, [], faults, extra=["trainer.test_freq=1"])
    trained(finished, 7)
    far = difference(finished)
    assert far.pop(2 * CUT + 1) > OTHER
    assert max(far.values()) < SAME
    report = finished.report()
    assert [cut["t_cut"] for cut in report["earlier_cuts"]] == [CUT, 2 * CUT]
    assert report["t_cut"] == 3 * CUT
    held, spoiled = report["validation_scores"]
    assert held["score"] == pytest.approx(finished.metrics[3 * CUT][METRIC], abs=0.02)
    assert spoiled["score"] < held["score"]
    assert report["advice"]["action"] != "stop"
    for line in ("scoring observed-step_2", "observed-step_2 scores", "observes on; the next cut is at step 4"):
        assert finished.log.count(f"RELEX: {line}") == 1


def test_a_validation_that_times_out(tmp_path: Path) -> None:
    """FSDP2 on two ranks, one engine with tensor parallelism of two; verl's own validation comes later."""
    relex = ["relex.on_cut=stop", "relex.validation_timeout_s=6"]
    options = {"strategy": "fsdp2", "ranks": 2, "extra": ["trainer.test_freq=5"]}
    finished = with_vllm(tmp_path, 5, relex, {"scoring": "hang"}, **options)
    trained(finished, 5)
    assert max(difference(finished).values()) < SAME
    advice = finished.report()["advice"]
    assert advice["action"] == "unscored"
    assert "ValidationTimeout" in advice["reason"]
    assert finished.log.count(f"RELEX: the scoring at step {CUT} failed; nothing is recommended") == 1
    assert METRIC in finished.metrics[5]


@pytest.mark.parametrize("moment", ["kill", "kill-sending"])
def test_an_engine_that_dies_while_scoring(tmp_path: Path, moment: str) -> None:
    """There is no policy in the rollout any more: the one error that ends a run, and RELEX says so.

    In the middle of an answer, or of taking weights: then verl waits for ever, and RELEX does not.
    """
    finished = with_vllm(tmp_path, 5, ["relex.rollout_timeout_s=30"], {"scoring": moment})
    assert finished.code != 0
    assert max(finished.trained()) <= CUT
    assert f"RELEX: the scoring at step {CUT} failed; nothing is recommended" in finished.log
    assert f"after the scoring at step {CUT} the rollout could not be given the policy's weights back" in finished.log
    silent = "the rollout did not come back from taking weights within relex.rollout_timeout_s=30"
    assert (silent in finished.log) == (moment == "kill-sending")


def test_colocate_async_stops_at_a_win(tmp_path: Path) -> None:
    options = {"option": "colocate_async", "extra": [ORDERED, "trainer.test_freq=5"]}
    finished = with_vllm(tmp_path, 5, ["relex.on_cut=stop"], {"scoring": "flatter"}, **options)
    trained(finished, CUT)
    report = finished.report()
    assert (report["advice"]["action"], report["advice"]["score"]) == ("stop", 1.0)
    assert (tmp_path / "relex" / "recommended" / "model.safetensors").exists()
    assert (tmp_path / "checkpoints" / f"global_step_{CUT}" / "actor").exists()


def test_separate_async_is_scored_and_survives_a_timeout(tmp_path: Path) -> None:
    """An engine that verl lends to the training and one that stands alone; the second cut's validation hangs."""
    options = {"option": "separate_async", "extra": [ORDERED, *STANDALONE, "trainer.test_freq=6"]}
    relex = ["relex.validation_timeout_s=10"]
    finished = with_vllm(tmp_path, 6, relex, {"scoring": "hang", "after": 2}, **options)
    trained(finished, 6)
    assert max(difference(finished).values()) < SAME
    report = finished.report()
    (first,) = report["earlier_cuts"]
    assert (first["t_cut"], first["advice"]["action"], len(first["validation_scores"])) == (CUT, "keep_training", 2)
    assert (report["t_cut"], report["advice"]["action"]) == (2 * CUT, "unscored")
    assert METRIC in finished.metrics[6]
