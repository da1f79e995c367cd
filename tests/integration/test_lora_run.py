"""LoRA in verl's real trainer: adapters are followed, predicted and scored through verl's own adapter path."""

import json

import pytest
import torch
from harness import BASE, CUT, RELEX, SHARDS, STEPS, TARGETS, Run, base_model, checkout, load, merged, predicted, run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

# Any rate at which adapters of rank 8 learn something in four steps.
OPTIONS = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.actor.optim.lr=1e-3", SHARDS]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """To begin with, as an override: verl draws A anew at each start, and two runs would not be the same."""
    base_model.build(BASE)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), config).save_pretrained(folder)
    return f"actor_rollout_ref.model.lora_adapter_path={folder}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, adapter: str) -> Run:
    """Without RELEX, FSDP2: what verl does to hand over adapters of FSDP1 fails in torch on a CPU."""
    out = tmp_path_factory.mktemp("plain-lora")
    return run(out, STEPS, strategy="fsdp2", relex=None, extra=[*OPTIONS, adapter])


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, adapter: str) -> Run:
    """The same with RELEX: observed, cut, scored, and trained on."""
    relex, extra = [*RELEX, "relex.observe_every=1"], [*OPTIONS, adapter, f"trainer.save_freq={CUT}"]
    return run(tmp_path_factory.mktemp("lora"), STEPS, strategy="fsdp2", relex=relex, extra=extra)


def test_training_is_not_disturbed(plain: Run, followed: Run) -> None:
    """Same seeds: the same rewards, losses and gradient norms, to the last bit, also after predictions were scored."""
    assert plain.code == 0, plain.log[-3000:]
    assert followed.code == 0, followed.log[-3000:]
    assert not followed.complaints()
    assert sorted(plain.trained()) == list(range(1, STEPS + 1))
    assert plain.trained() == followed.trained()


def test_predictions_are_scored(followed: Run) -> None:
    """By the adapters that the rollout was given: another one, another answer."""
    scores = {row["name"]: row["score"] for row in followed.report()["validation_scores"]}
    assert scores.keys() == {f"observed-step_{CUT}", *(f"relex-step_{target}" for target in TARGETS)}
    assert len(set(scores.values())) > 1


def test_a_checkout_is_the_adapter_that_verl_saves(followed: Run) -> None:
    saved = load(merged(followed.out / "checkpoints" / f"global_step_{CUT}" / "actor") / "lora_adapter")
    ours = checkout(followed, CUT)
    assert ours.keys() == saved.keys()
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in ours.items())
    error = json.loads((followed.out / f"checkout-{CUT}" / "relex.json").read_text())["max_error"]
    for name, tensor in saved.items():  # verl's merger rounds to bfloat16
        torch.testing.assert_close(ours[name], tensor.float(), rtol=2**-8, atol=error)


@pytest.mark.parametrize("target", TARGETS)
def test_peft_loads_a_prediction(followed: Run, target: int) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, followed.out / "relex" / "predicted" / f"relex-step_{target}")
    loaded = {name.replace(".default", ""): tensor for name, tensor in peft.state_dict().items() if "lora_" in name}
    written = predicted(followed, target)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
