"""Which LoRA is refused from the configuration and from an adapter's own, composed by Hydra with verl's own schema."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from verl_config import composed

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.lora import check_adapter
from relex_verl.verl_plugin.settings import checked_config

MODEL = "actor_rollout_ref.model"
RANK, MERGE = f"{MODEL}.lora_rank=8", f"{MODEL}.lora.merge=true"
FSDP2 = "actor_rollout_ref.actor.strategy=fsdp2"
PLAIN = {"peft_type": "LORA", "bias": "none", "r": 8, "use_dora": False, "modules_to_save": None}


@pytest.mark.parametrize(
    ("overrides", "relex"),
    [
        ((), "default"),
        ((RANK,), "default"),
        ((RANK, FSDP2), "default"),
        ((RANK, FSDP2), "colocate_async"),
        ((RANK, MERGE), "default"),
        ((RANK, MERGE), "separate_async"),
    ],
)
def test_plain_adapters_of_the_fsdp_engines_are_followed(overrides: tuple[str, ...], relex: str) -> None:
    checked_config(composed(*overrides, relex=relex))


@pytest.mark.parametrize(
    ("overrides", "relex", "said"),
    [
        ((f"{MODEL}.lora.rank=8",), "default", r"model\.lora\.rank=8: .*lora_rank"),
        ((f"{MODEL}.lora_adapter_path=a",), "default", r"model\.lora_adapter_path='a': .*lora_rank above 0"),
        ((RANK,), "separate_async", r"model\.lora\.merge=False: .*set lora\.merge=true"),
        (
            (RANK, MERGE, f"+{MODEL}.target_parameters=[x]"),
            "default",
            r"model\.target_parameters=\['x'\]: .*target_modules",
        ),
        ((RANK, MERGE, f"{MODEL}.lora.type=dora"), "default", r"model\.lora\.type='dora': .*set lora"),
        (
            (RANK, MERGE, "actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded"),
            "separate_async",
            r"checkpoint_engine\.backend='delta_sharded': .*another backend",
        ),
        (("model_engine=megatron", f"{MODEL}.lora.adapter_path=a"), "default", r"model\.lora\.adapter_path='a': "),
        (
            ("model_engine=megatron", f"{MODEL}.lora.rank=8"),
            "default",
            r"model\.lora\.rank=8: .*strategy=megatron .*use fsdp or fsdp2",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(overrides: tuple[str, ...], relex: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        checked_config(composed(*overrides, relex=relex))


def test_without_adapters_from_fsdp1_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for peft 0.21, which does not look behind FSDP1's wrapper; the one that is installed does."""
    monkeypatch.setattr(peft, "get_peft_model_state_dict", lambda *_, **__: {})
    with pytest.raises(ConfigError, match=r"model\.lora\.merge=False: peft .* finds no adapters in verl's FSDP1"):
        checked_config(composed(RANK))
    checked_config(composed(RANK, FSDP2))


def test_a_local_adapter_is_looked_into(tmp_path: Path) -> None:
    file, path = tmp_path / "adapter_config.json", f"{MODEL}.lora_adapter_path={tmp_path}"
    file.write_text(json.dumps(PLAIN))
    checked_config(composed(RANK, MERGE, path))
    file.write_text(json.dumps({**PLAIN, "use_dora": True}))
    with pytest.raises(ConfigError, match=r"lora_adapter_path='.*': has use_dora=True: .*plain LoRA adapter"):
        checked_config(composed(RANK, MERGE, path))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "all"}, "bias='all'"),
        ({"target_parameters": ["experts"]}, "target_parameters=['experts']"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_more_than_a_and_b_is_refused(extra: dict[str, Any], said: str) -> None:
    check_adapter(PLAIN, "adapter")
    check_adapter(PLAIN, None)
    for path, key in (("adapter", "lora_adapter_path='adapter'"), (None, "lora_rank=8")):
        with pytest.raises(ConfigError) as refusal:
            check_adapter({**PLAIN, **extra}, path)
        assert str(refusal.value).startswith(f"{MODEL}.{key}: has {said}")
