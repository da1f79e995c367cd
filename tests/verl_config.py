"""verl's configuration of a run, composed by Hydra with verl's own schema."""

from pathlib import Path

import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONFIG = str(Path(verl.__file__).parent / "trainer" / "config")


def composed(*overrides: str, relex: str | None = "default", hydra: bool = False) -> DictConfig:
    """The configuration of a run of 100 steps.

    Args:
        overrides: of verl's configuration.
        relex: the option of `+relex=`, None leaves it out.
        hydra: keep Hydra's own node, as Hydra's callbacks get it.
    """
    chosen = [] if relex is None else [f"+relex={relex}"]
    with initialize_config_dir(CONFIG, version_base=None):
        given = [*chosen, "trainer.total_training_steps=100", *overrides]
        return compose("ppo_trainer", given, return_hydra_config=hydra)
