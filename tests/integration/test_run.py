"""verl's real trainer with RELEX on, FSDP1 and FSDP2, 1 and 2 ranks: right numbers, and a training that never notices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import BASE, Run, checkout, load, relex_verl, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(1200)]

STEPS, CUT, TARGETS = 6, 4, [6, 12]
RELEX = [
    f"relex.t_cut={CUT}",
    f"relex.targets={TARGETS}",
    "relex.max_candidates=2",
    "relex.score_metric=val-core/addition/acc/mean@1",
]
SAVE = ["actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]", f"trainer.save_freq={CUT}"]

SHARDS = "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra]"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without RELEX, FSDP1 on one rank, validated at the cut."""
    return run(tmp_path_factory.mktemp("plain"), STEPS, relex=None, extra=[f"trainer.test_freq={CUT}"])


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with RELEX on: bf16 rows, predictions scored at the cut, two more steps after it."""
    extra = [*SAVE, f"trainer.test_freq={CUT}"]
    return run(tmp_path_factory.mktemp("bf16"), STEPS, relex=[*RELEX, "relex.trajectory=bf16"], extra=extra)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """FSDP1 and FSDP2 on two ranks, up to the cut."""
    relex = [*RELEX, "relex.trajectory=bf16", "relex.validate_targets=false"]
    # With FSDP1 on two gloo ranks verl 0.9.1 cannot save `hf_model`, with or without RELEX: torch's full state dict fails
    # on CPU storage. Its sharded checkpoint is merged by verl's own merger instead.
    save = {"fsdp": [f"trainer.save_freq={CUT}", SHARDS], "fsdp2": SAVE}
    return {
        strategy: run(tmp_path_factory.mktemp(strategy), CUT, strategy=strategy, ranks=2, relex=relex, extra=extra)
        for strategy, extra in save.items()
    }


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """FSDP2 on one rank, whose parameters are bfloat16 themselves: the default trajectory is not to be had."""
    relex = [*RELEX, "relex.validate_targets=false"]
    extra = [*SAVE, "actor_rollout_ref.actor.fsdp_config.model_dtype=bf16"]
    return run(tmp_path_factory.mktemp("rounded"), CUT, strategy="fsdp2", relex=relex, extra=extra)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Run]:
    """Float32 master weights, the default: FSDP2 on one rank, FSDP1 and FSDP2 on two; (strategy, ranks) -> run."""
    relex = [*RELEX, "relex.observe_every=1", "relex.validate_targets=false"]
    save = {("fsdp2", 1): SAVE, ("fsdp", 2): [], ("fsdp2", 2): []}
    return {
        (strategy, ranks): run(
            tmp_path_factory.mktemp(f"fp32-{strategy}-{ranks}"),
            CUT,
            strategy=strategy,
            ranks=ranks,
            relex=relex,
            extra=extra,
        )
        for (strategy, ranks), extra in save.items()
    }


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """FSDP2 on one rank, as `master`, followed by a sketch that verl's checkpoints make it store."""
    relex = [*RELEX, "relex.trajectory=sketch", "relex.validate_targets=false"]
    extra = [SHARDS, "trainer.save_freq=2"]
    return run(tmp_path_factory.mktemp("sketch"), CUT, strategy="fsdp2", relex=relex, extra=extra)


def dense_svd_prediction(
    states: list[dict[str, torch.Tensor]], steps: list[int], target: int
) -> dict[str, torch.Tensor]:
    """Paper, Algorithm 2, over the checkouts of all observed steps, in float64."""
    predicted = {}
    for name, origin in states[0].items():
        deltas = torch.stack([(state[name].double() - origin.double()).flatten() for state in states[1:]])
        left, sigma, right = torch.linalg.svd(deltas, full_matrices=False)
        times = torch.tensor(steps, dtype=torch.float64)
        design = torch.stack([times, torch.ones_like(times)], 1)
        slope, intercept = torch.linalg.lstsq(design, (left[:, 0] * sigma[0]).unsqueeze(1)).solution.flatten()
        predicted[name] = (origin.double() + ((slope * target + intercept) * right[0]).view_as(origin)).bfloat16()
    return predicted


def check_against_dense(finished: Run, gram_error: float = 1e-12, wrong_share: float = 1e-5) -> None:
    """Gram matrix and predictions are those of a dense SVD over the checkouts of all observed steps."""
    assert finished.code == 0, finished.log[-3000:]
    trajectory = Trajectory(finished.out / "relex" / "trajectory")
    assert trajectory.steps == list(range(1, CUT + 1))
    states = [checkout(finished, step) for step in range(CUT + 1)]
    gram = replay.window(trajectory).gram_LTT
    for i, name in enumerate(trajectory.names):
        deltas = torch.stack([(s[name].double() - states[0][name].double()).flatten() for s in states[1:]])
        expected = deltas @ deltas.T
        torch.testing.assert_close(gram[i], expected, rtol=gram_error, atol=gram_error * float(expected.abs().max()))
    for target in TARGETS:
        expected_weights = dense_svd_prediction(states, trajectory.steps, target)
        written = predicted(finished, target)
        assert written.keys() == expected_weights.keys()
        assert different(written, expected_weights) <= wrong_share


def predicted(finished: Run, target: int) -> dict[str, torch.Tensor]:
    return load(finished.out / "relex" / "predicted" / f"relex-step_{target}")


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of the elements in which two checkpoints differ."""
    return sum(int((one[name] != other[name]).sum()) for name in one) / sum(tensor.numel() for tensor in one.values())


def check_checkout_is_verls_export(finished: Run) -> None:
    actor = finished.out / "checkpoints" / f"global_step_{CUT}" / "actor"
    export = load(actor / "huggingface") or load(merged(actor))
    ours = checkout(finished, CUT)
    assert ours.keys() == export.keys()
    for name, tensor in export.items():
        assert torch.equal(ours[name].view(torch.int16), tensor.to(torch.bfloat16).view(torch.int16)), name


def merged(actor: Path) -> Path:
    """verl's own Hugging Face export of a sharded checkpoint."""
    arguments = ["merge", "--backend", "fsdp", "--local_dir", str(actor), "--target_dir", str(actor / "merged")]
    subprocess.run(
        [sys.executable, "-m", "verl.model_merger", *arguments], check=True, capture_output=True, timeout=300
    )
    return actor / "merged"


def test_training_is_not_disturbed(plain: Run, observed: Run) -> None:
    """Same seeds: the same rewards, losses and gradient norms, to the last bit, also after the scoring at the cut."""
    assert plain.code == 0, plain.log[-3000:]
    assert observed.code == 0, observed.log[-3000:]
    assert sorted(plain.trained()) == list(range(1, STEPS + 1))
    assert plain.trained() == observed.trained()
    assert {"actor/grad_norm", "critic/score/mean"} <= plain.trained()[STEPS].keys()
    validated = {s: {k: v for k, v in m.items() if k.startswith("val-")} for s, m in plain.metrics.items()}
    assert any(validated.values())
    assert validated == {s: {k: v for k, v in m.items() if k.startswith("val-")} for s, m in observed.metrics.items()}


def test_fsdp1_one_rank(observed: Run) -> None:
    check_against_dense(observed)
    check_checkout_is_verls_export(observed)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_two_ranks(two_ranks: dict[str, Run], strategy: str) -> None:
    check_against_dense(two_ranks[strategy])
    check_checkout_is_verls_export(two_ranks[strategy])


def test_fsdp2_one_rank_falls_back_to_bf16_and_says_why(rounded: Run) -> None:
    check_against_dense(rounded)
    check_checkout_is_verls_export(rounded)
    said = [line for line in rounded.log.splitlines() if "relex.trajectory=fp32 becomes bf16" in line]
    assert len(said) == 1
    assert "the engine's parameters are torch.bfloat16" in said[0]
    assert "rows of bf16: about" in rounded.log


def test_master_weights(master: dict[tuple[str, int], Run]) -> None:
    """The float32 reconstruction is within its bound of verl's own float32 export."""
    finished = master["fsdp2", 1]
    assert finished.code == 0, finished.log[-3000:]
    export = load(finished.out / "checkpoints" / f"global_step_{CUT}" / "actor" / "huggingface")
    ours = checkout(finished, CUT)
    bound = json.loads((finished.out / f"checkout-{CUT}" / "relex.json").read_text())["max_error"]
    assert 0 < bound < 1e-5
    for name, tensor in export.items():
        assert tensor.dtype == ours[name].dtype == torch.float32
        assert float((ours[name] - tensor).abs().max()) <= bound


def test_float32_predictions_do_not_depend_on_ranks_or_strategy(master: dict[tuple[str, int], Run]) -> None:
    """Each is the dense one of its own states. Between FSDP1 and FSDP2 the training itself is the same; between one and
    two ranks verl adds gradients up in another order, and the weights that it trains differ already."""
    for finished in master.values():
        # Increments do not quite add up to what they move float32 weights by, norm layers (about 1) least of all.
        check_against_dense(finished, gram_error=1e-3, wrong_share=1e-4)
    for target in TARGETS:
        assert different(predicted(master["fsdp", 2], target), predicted(master["fsdp2", 2], target)) <= 1e-4


def test_a_sketch_predicts_what_the_rows_predict(sketched: Run, master: dict[tuple[str, int], Run]) -> None:
    """Four steps and four moments: nothing is lost but the float32 rows' own rounding to 8 bits."""
    assert sketched.code == 0, sketched.log[-3000:]
    for target in TARGETS:
        assert different(predicted(sketched, target), predicted(master["fsdp2", 1], target)) <= 5e-3
    trajectory = Trajectory(sketched.out / "relex" / "trajectory")
    assert (trajectory.steps, trajectory.window.stored) == ([1, 2, 3, 4], [2, 4])
    at_cut = sketched.metrics[CUT]
    assert 0 < at_cut["relex/explained_variance/mean"] <= 1
    assert not any(name.startswith(("relex/line_r2", "relex/drift", "relex/ready", "relex/changed")) for name in at_cut)
    assert sketched.report()["fits"]["tensors"][0]["line_r2"] is None


def test_predicted_checkpoints_are_usable_and_repeatable(observed: Run, tmp_path: Path) -> None:
    """transformers loads them; the command line gives the same bits from the trajectory alone."""
    trajectory = str(observed.out / "relex" / "trajectory")
    arguments = ["--t-cut", str(CUT), "--target", ",".join(map(str, TARGETS)), "--out", str(tmp_path)]
    relex_verl("extrapolate", trajectory, *arguments)
    for target in TARGETS:
        online = observed.out / "relex" / "predicted" / f"relex-step_{target}"
        model = AutoModelForCausalLM.from_pretrained(online)
        assert model.dtype == torch.bfloat16
        assert AutoTokenizer.from_pretrained(online).eos_token == AutoTokenizer.from_pretrained(BASE).eos_token
        offline = tmp_path / f"relex-step_{target}"
        assert (online / "model.safetensors").read_bytes() == (offline / "model.safetensors").read_bytes()
        said = json.loads((online / "relex.json").read_text())
        assert said["observed_steps"] == [1, 2, 3, 4]
        assert {"base_model", "method", "rank", "t_cut", "target", "trajectory", "versions"} <= said.keys()


def test_metrics_and_report(observed: Run) -> None:
    logged = observed.metrics
    for step in range(1, CUT + 1):
        assert 0 < logged[step]["relex/changed_share"] < 1
        assert logged[step]["timing_s/relex"] > 0
    at_cut = logged[CUT]
    for figure in ("explained_variance", "line_r2", "drift"):
        assert {f"relex/{figure}/{statistic}" for statistic in ("mean", "p10", "min")} <= at_cut.keys()
    assert at_cut["relex/stored_bytes"] > logged[1]["relex/stored_bytes"]
    assert {"relex/backtest/error_vs_hold", "relex/ready", "relex/drift"} <= at_cut.keys()
    assert not any(name.startswith("relex/changed") for name in logged[STEPS])
    report = observed.report()
    assert report["fits"]["random_walk_null"]["explained_variance"] > 0.8
    assert {row["tensor"] for row in report["fits"]["tensors"]} == set(load(BASE))
    assert report["advice"]["action"] in ("stop", "keep_training")
    assert "data:image/png;base64," in (observed.out / "relex" / "report.html").read_text()


def test_scores_are_verls_own(plain: Run, observed: Run) -> None:
    """The last observed weights along the predicted-weights path score exactly what verl's validation gives them."""
    held, *candidates = observed.report()["validation_scores"]
    metric = "val-core/addition/acc/mean@1"
    assert held["name"] == f"observed-step_{CUT}"
    assert held["score"] == plain.metrics[CUT][metric] == observed.metrics[CUT][metric]
    assert 1 <= len(candidates) <= 2
    for row in candidates:
        assert observed.metrics[CUT][f"relex/val/{row['name']}/{metric}"] == row["score"]
        scores = observed.out / "relex" / "scores" / f"cut_{CUT}" / f"{row['name']}.json"
        kept = json.loads(scores.read_text())  # prompt -> every sample's score
        assert len(kept) == row["prompts"]
        mean = sum(sum(samples) / len(samples) for samples in kept.values()) / len(kept)
        assert mean == pytest.approx(row["score"], abs=1e-6)
