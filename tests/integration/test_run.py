"""verl's real trainer with RELEX on, FSDP1 and FSDP2, 1 and 2 ranks: right numbers, and a training that never notices."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from harness import (
    BASE,
    CUT,
    EXPORT,
    METRIC,
    RELEX,
    SHARDS,
    STEPS,
    TARGETS,
    Run,
    check_against_dense,
    checkout,
    data,
    different,
    load,
    merged,
    predicted,
    relex_verl,
    run,
    same_bits,
)
from pictures import check_page
from transformers import AutoModelForCausalLM, AutoTokenizer

from relex_verl.trajectory.store import Trajectory

OBSERVED = list(range(1, CUT + 1))
SAVE = [EXPORT, f"trainer.save_freq={CUT}"]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`plain` with RELEX on: bf16 rows, predictions scored at the cut, two more steps after it."""
    extra = [*SAVE, f"trainer.test_freq={CUT}"]
    return run(tmp_path_factory.mktemp("bf16"), STEPS, relex=[*RELEX, "relex.trajectory=bf16"], extra=extra)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Float32 master weights, the default, FSDP2 on one rank, up to the cut."""
    relex = [*RELEX, "relex.observe_every=1", "relex.validate_targets=false"]
    return run(tmp_path_factory.mktemp("fp32"), CUT, strategy="fsdp2", relex=relex, extra=SAVE)


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`master` followed by a sketch that verl's checkpoints make it store, one step beyond the cut; nothing overlaps.

    Without a validation set: verl loads no empty file, but leaves out what is too long.
    """
    out = tmp_path_factory.mktemp("sketch")
    _, validation = data.write(out / "data")
    long = pd.read_parquet(validation)
    long["prompt"] = [[{"role": "user", "content": "1+" * 50 + "1="}] for _ in range(len(long))]
    long.to_parquet(out / "long.parquet")
    empty = [
        f"data.val_files={out / 'long.parquet'}",
        "data.val_batch_size=1",
        "data.filter_overlong_prompts=True",
    ]
    relex = [*RELEX, "relex.trajectory=sketch", "relex.on_cut=stop", "relex.overlap=false"]
    extra = [SHARDS, "trainer.save_freq=2", *empty]
    return run(out, CUT + 1, strategy="fsdp2", relex=relex, extra=extra)


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


def test_rows_of_bf16(observed: Run) -> None:
    """FSDP1 on one rank: the checkout is verl's export, the predictions are those of a dense SVD."""
    check_against_dense(observed, OBSERVED, TARGETS)
    same_bits(checkout(observed, CUT), load(actor_of(observed) / "huggingface"))


def actor_of(finished: Run) -> Path:
    """verl's checkpoint of the cut."""
    return finished.out / "checkpoints" / f"global_step_{CUT}" / "actor"


def max_error(finished: Run) -> float:
    """What the checkout of the cut promises."""
    return json.loads((finished.out / f"checkout-{CUT}" / "relex.json").read_text())["max_error"]


def test_master_weights(master: Run) -> None:
    """FSDP2 on one rank: the float32 reconstruction is within its bound of verl's own float32 export."""
    # Increments do not quite add up to what they move float32 weights by, norm layers (about 1) least of all.
    check_against_dense(master, OBSERVED, TARGETS, gram_error=1e-3, wrong_share=1e-4)
    export, ours = load(actor_of(master) / "huggingface"), checkout(master, CUT)
    assert export.keys() == ours.keys()
    assert 0 < max_error(master) < 1e-5
    for name, tensor in export.items():
        assert tensor.dtype == ours[name].dtype == torch.float32
        assert float((ours[name] - tensor).abs().max()) <= max_error(master)


def test_master_weights_of_two_ranks(two_ranks: Run) -> None:
    """FSDP1: what the ranks wrote is verl's merged checkpoint, within the bound and the merger's rounding."""
    check_against_dense(two_ranks, OBSERVED, TARGETS, gram_error=1e-3, wrong_share=1e-4)
    export, ours = load(merged(actor_of(two_ranks))), checkout(two_ranks, CUT)
    assert export.keys() == ours.keys()
    assert 0 < max_error(two_ranks) < 1e-5
    for name, tensor in export.items():
        rounding = tensor.float().abs() * 2**-8
        assert bool(((ours[name] - tensor.float()).abs() <= max_error(two_ranks) + rounding).all()), name


def test_a_sketch_predicts_what_the_rows_predict(sketched: Run, master: Run) -> None:
    """Four steps and four moments: nothing is lost but the float32 rows' own rounding to 8 bits."""
    assert sketched.code == 0, sketched.log[-3000:]
    for target in TARGETS:
        assert different(predicted(sketched, target), predicted(master, target)) <= 5e-3
    trajectory = Trajectory(sketched.out / "relex" / "trajectory")
    assert (trajectory.steps, trajectory.record.stored) == ([1, 2, 3, 4], [2, 4])
    at_cut = sketched.metrics[CUT]
    assert 0 < at_cut["relex/explained_variance/mean"] <= 1
    assert not any(name.startswith(("relex/line_r2", "relex/drift", "relex/ready", "relex/changed")) for name in at_cut)
    assert sketched.report()["fits"]["tensors"][0]["line_r2"] is None


def test_without_a_validation_set_nothing_is_recommended(plain: Run, master: Run, sketched: Run) -> None:
    """And the training goes on, as without RELEX, but that FSDP2 adds the gradients' norm up in another order."""
    steps = range(1, CUT + 2)
    assert sorted(sketched.trained()) == list(steps)
    for step in steps:
        assert sketched.trained()[step] == pytest.approx(plain.trained()[step], rel=1e-4, abs=1e-8)
        if step <= CUT:
            assert sketched.trained()[step] == master.trained()[step]
    assert sketched.complaints() == []
    advice = sketched.report()["advice"]
    assert advice["action"] == "unscored"
    assert "the validation set is empty" in advice["reason"]
    assert (sketched.out / "relex" / "predicted" / f"relex-step_{TARGETS[0]}" / "model.safetensors").exists()


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
    seen = [logged[step].get("relex/observed_step") for step in range(1, CUT + 1)]
    assert seen == [None, *range(1, CUT - 1), CUT]  # the row before, and at the cut its own
    for step in range(1, CUT + 1):
        assert seen[step - 1] is None or 0 < logged[step]["relex/changed_share"] < 1
        assert logged[step]["timing_s/relex"] > 0
    at_cut = logged[CUT]
    for figure in ("explained_variance", "line_r2", "drift"):
        assert {f"relex/{figure}/{statistic}" for statistic in ("mean", "p10", "min")} <= at_cut.keys()
    assert at_cut["relex/stored_bytes"] > logged[2]["relex/stored_bytes"]
    assert {"relex/backtest/error_vs_hold", "relex/ready", "relex/drift"} <= at_cut.keys()
    assert not any(name.startswith("relex/changed") for name in logged[STEPS])
    report = observed.report()
    assert report["fits"]["random_walk_null"]["explained_variance"] > 0.8
    assert {row["tensor"] for row in report["fits"]["tensors"]} == set(load(BASE))
    assert report["advice"]["action"] in ("stop", "keep_training")
    assert check_page(observed.out / "relex" / "report.html") == 5


def test_scores_are_verls_own(plain: Run, observed: Run) -> None:
    """The last observed weights along the predicted-weights path score exactly what verl's validation gives them."""
    held, *candidates = observed.report()["validation_scores"]
    assert held["name"] == f"observed-step_{CUT}"
    assert held["score"] == plain.metrics[CUT][METRIC] == observed.metrics[CUT][METRIC]
    assert 1 <= len(candidates) <= 2
    for row in candidates:
        assert observed.metrics[CUT][f"relex/val/{row['name']}/{METRIC}"] == row["score"]
        scores = observed.out / "relex" / "scores" / f"cut_{CUT}" / f"{row['name']}.json"
        kept = json.loads(scores.read_text())  # prompt -> every sample's score
        assert len(kept) == row["prompts"]
        mean = sum(sum(samples) / len(samples) for samples in kept.values()) / len(kept)
        assert mean == pytest.approx(row["score"], abs=1e-6)
