"""What is refused by verl's configuration alone: key, value and cure of each, and what looks like it and passes."""

import logging
from pathlib import Path

import pytest
from verl_config import composed

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.settings import checked_config

ACTOR, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.model"
MEGATRON = f"{ACTOR}.megatron"
BACKEND = "actor_rollout_ref.rollout.checkpoint_engine.backend"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([f"{ACTOR}.strategy=automodel"], f"{ACTOR}.strategy='automodel': .*train with one of fsdp, fsdp2"),
        (["model_engine=megatron", f"{MEGATRON}.use_mbridge=false"], f"{MEGATRON}.use_mbridge=False: .*set it to true"),
        (["model_engine=megatron", f"{MEGATRON}.vanilla_mbridge=true"], "vanilla_mbridge=True: .*set it to false"),
        (["model_engine=megatron", f"{MEGATRON}.use_megatron_fsdp=true"], "use_megatron_fsdp=True: .*set it to false"),
        (
            ["model_engine=torchtitan", f"{ACTOR}.torchtitan.pipeline_parallel_size=2"],
            f"{ACTOR}.torchtitan.pipeline_parallel_size=2: .*set it to 1",
        ),
        ([f"{ACTOR}.fsdp_config.qat.enable=true"], f"{ACTOR}.fsdp_config.qat.enable=True: .*switch it off"),
        (["model_engine=megatron", f"{MEGATRON}.qat.enable=true"], f"{MEGATRON}.qat.enable=True: .*switch it off"),
        (
            ["model_engine=veomni", f"{ACTOR}.veomni.qat_implementation=fp8"],
            f"{ACTOR}.veomni.qat_implementation='fp8': .*none",
        ),
        ([f"{MODEL}.path=hdfs://here/model"], f"{MODEL}.path='hdfs://here/model': .*copy it to a folder"),
        (["trainer.default_local_dir=''"], "trainer.default_local_dir='': .*give a folder, or set relex.output_dir"),
        (["trainer.default_local_dir=null"], "trainer.default_local_dir=None: .*give a folder"),
        (["trainer.default_local_dir=hdfs://here/run"], "relex.output_dir='hdfs://here/run/relex': .*folders only"),
        (["relex.on_cut=jump", "model_engine=megatron"], f"{ACTOR}.strategy='megatron': a jump sets the weights of fsdp"),
        (["relex.on_cut=jump", f"{ACTOR}.fsdp_config.fsdp_size=1"], "fsdp_size=1: .*each of the 8 copies by itself"),
        (["trainer.nnodes=2", "relex.output_dir=/dev/shm/run"], "relex.output_dir='/dev/shm/run': each of the 2 nodes"),
        (["trainer.nnodes=4", "trainer.default_local_dir=/tmp/run"], "relex.output_dir='/tmp/run/relex': each of the 4"),
    ],
)  # fmt: skip
def test_refused_with_key_value_and_cure(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        checked_config(composed(*overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model_engine=megatron"],
        ["model_engine=veomni"],
        ["model_engine=torchtitan"],
        [f"{ACTOR}.strategy=fsdp2"],
        [f"{MODEL}.lora.merge=true"],
        ["trainer.default_local_dir=''", "relex.output_dir=/some/where"],
        ["trainer.default_local_dir=/tmp/run"],
        [f"{BACKEND}=delta_sharded"],
        ["relex.on_cut=jump", f"{ACTOR}.fsdp_config.fsdp_size=4"],
        ["relex.on_cut=jump", f"{ACTOR}.strategy=fsdp2", f"{ACTOR}.fsdp_config.fsdp_size=1"],
    ],
)
def test_what_can_be_followed_passes(overrides: list[str]) -> None:
    checked_config(composed(*overrides))


def test_deltas_are_refused_where_predictions_would_be_sent_by_them() -> None:
    with pytest.raises(ConfigError, match=rf"{BACKEND}='delta_sharded': .*nccl .*relex.validate_targets=false"):
        checked_config(composed(f"{BACKEND}=delta_sharded", relex="separate_async"))
    checked_config(composed(f"{BACKEND}=delta_sharded", "relex.validate_targets=false", relex="separate_async"))
    checked_config(composed(f"{BACKEND}=delta_sharded", relex="colocate_async"))


@pytest.mark.parametrize(("nodes", "warned"), [(1, False), (2, True)])
def test_a_disk_of_this_machine_may_be_shared_by_the_nodes(
    nodes: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A relative folder: the trainer may start in another place than the command."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "relex_verl"):
        checked_config(composed(f"trainer.nnodes={nodes}", "trainer.default_local_dir=run"))
    assert ("relex.output_dir=run/relex is on a disk of this machine" in caplog.text) == warned
