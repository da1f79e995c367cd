"""What is refused from the configuration alone, composed by Hydra with verl's own schema."""

import pytest
from verl_config import composed

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.early_check import EarlyCheck
from relex_verl.verl_plugin.settings import MODES, checked_config


@pytest.mark.parametrize(
    ("option", "mode"),
    [("default", "relex_sync"), ("colocate_async", "relex_colocate_async"), ("separate_async", "relex_separate_async")],
)
def test_options_choose_the_mode(option: str, mode: str) -> None:
    config = composed(relex=option)
    assert config.trainer.v1.trainer_mode == mode
    assert checked_config(config).t_cut == 0.15
    assert config.relex.output_dir == f"{config.trainer.default_local_dir}/relex"


@pytest.mark.parametrize("option", MODES)
def test_verls_name_of_the_chosen_mode_is_taken_for_relexs(option: str) -> None:
    config = composed(f"trainer.v1.trainer_mode={MODES[option]}", relex=option, hydra=True)
    EarlyCheck().on_run_start(config, config_name="ppo_trainer")
    assert config.trainer.v1.trainer_mode == f"relex_{MODES[option]}"
    EarlyCheck().on_job_start(config)


def test_another_mode_than_the_chosen_one_is_not() -> None:
    config = composed("trainer.v1.trainer_mode=colocate_async", hydra=True)
    EarlyCheck().on_run_start(config, config_name="ppo_trainer")
    with pytest.raises(SystemExit, match=r"choose the mode by \+relex=colocate_async"):
        EarlyCheck().on_job_start(config)


def test_a_sweep_goes_on_without_it() -> None:
    config = composed("trainer.v1.trainer_mode=sync", "trainer.save_freq=1", hydra=True)
    EarlyCheck().on_multirun_start(config)
    given = ["+relex=default", "trainer.total_training_steps=100", "trainer.save_freq=1"]
    assert config.hydra.overrides.task == given


def test_without_the_override_nothing_changes() -> None:
    config = composed(relex=None)
    assert "relex" not in config
    assert config.trainer.v1.trainer_mode == "sync"


@pytest.mark.parametrize(
    ("override", "key", "cure"),
    [
        ("+relex.tcut=40", "relex.tcut", "did you mean relex.t_cut"),
        ("relex.t_cut=101", "relex.t_cut", "the run has 100"),
        ("relex.t_cut=-1", "relex.t_cut", "give a share"),
        ("relex.targets=[15]", "relex.targets", "not after the cut at 15"),
        ("relex.targets=[]", "relex.targets", "give a list"),
        ("relex.observe_every=0", "relex.observe_every", "1 or more"),
        ("relex.methods=[relax]", "relex.methods", "give one of relex"),
        ("relex.rank=0", "relex.rank", "1 or more"),
        ("relex.rank=30", "relex.rank", "observed up to the cut"),
        ("relex.trajectory=fp64", "relex.trajectory", "give one of fp32, bf16"),
        ("relex.on_error=ignore", "relex.on_error", "disable, raise"),
        ("trainer.use_v1=false", "trainer.use_v1", "set trainer.use_v1=true"),
        (
            "trainer.v1.trainer_mode=colocate_async",
            "trainer.v1.trainer_mode",
            "choose the mode by +relex=colocate_async",
        ),
        ("trainer.v1.trainer_mode=my_own", "trainer.v1.trainer_mode", "would not run in this one"),
        ("trainer.total_training_steps='100'", "trainer.total_training_steps", "without quotes"),
    ],
)
def test_refused_with_key_value_and_cure(override: str, key: str, cure: str) -> None:
    config = composed(override)
    with pytest.raises(SystemExit) as refusal:
        EarlyCheck().on_job_start(config)
    said = str(refusal.value)
    assert key in said
    assert cure in said
    value = override.split("=", 1)[1].strip("[]")
    assert value.lower() in said.lower()


def test_every_exception_refuses() -> None:
    """Hydra would make a warning of it, and start the run."""
    config = composed()
    del config.trainer.v1
    with pytest.raises(SystemExit, match="the configuration could not be checked, so RELEX does not start: Config"):
        EarlyCheck().on_job_start(config)


def test_the_trainer_checks_as_well() -> None:
    """Who starts a trainer without Hydra's callback gets the same refusal."""
    with pytest.raises(ConfigError, match=r"relex\.observe_every=0"):
        checked_config(composed("relex.observe_every=0"))


def test_a_length_that_only_the_data_tell_is_left_to_the_trainer() -> None:
    """verl's default: trainer.total_training_steps is null, and a cut outside the run is refused by `on_length_known`."""
    config = composed("trainer.total_training_steps=null", "relex.t_cut=101")
    EarlyCheck().on_job_start(config)
    with pytest.raises(SystemExit, match="unknown key"):
        EarlyCheck().on_job_start(composed("trainer.total_training_steps=null", "+relex.tcut=101"))
