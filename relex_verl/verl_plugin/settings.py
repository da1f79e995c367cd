"""verl's configuration as RELEX reads it: the options of `+relex=...`, their check, and what identifies the run."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from relex_verl.run.config import RelexConfig
from relex_verl.verl_plugin import base_files, refusals
from relex_verl.verl_plugin.refusals import MODES

if TYPE_CHECKING:
    from relex_verl.run.protocol import RunFacts

__all__ = ["MODES", "checked_config", "option_node", "run_facts"]


def option_node(mode: str) -> dict[str, Any]:
    """What `+relex=<option>` merges into the run's configuration (package `_global_`).

    Args:
        mode: verl's trainer mode.
    """
    return {
        "relex": asdict(RelexConfig()),
        "trainer": {"v1": {"trainer_mode": f"relex_{mode}"}},
        # Hydra calls it in the driver before the main: mistakes are refused before Ray starts.
        "hydra": {"callbacks": {"relex": {"_target_": "relex_verl.verl_plugin.early_check.EarlyCheck"}}},
    }


def checked_config(config: DictConfig) -> RelexConfig:
    """The `relex` node, checked together with verl's own keys and with the base model's files.

    Raises:
        ConfigError: a value that cannot work, or a run that RELEX cannot follow.
    """
    relex = RelexConfig.from_mapping(OmegaConf.to_container(config.relex, resolve=True))  # type: ignore[arg-type]
    for check in [*refusals.CHECKS, *base_files.CHECKS]:
        check(config)
    return relex


def run_facts(config: DictConfig) -> "RunFacts":
    """What identifies the run."""
    from relex_verl.run.protocol import RunFacts  # not in each process that Hydra's options are stored in

    trainer = config.trainer
    base_model = str(config.actor_rollout_ref.model.path)
    samples = int(config.data.train_batch_size) * int(config.actor_rollout_ref.rollout.n)
    return RunFacts(base_model, trainer.project_name, trainer.experiment_name, trainer.resume_mode, samples)
