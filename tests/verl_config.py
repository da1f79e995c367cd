"""verl's configuration of a run, composed by Hydra with verl's own schema."""

from pathlib import Path

import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

CONFIG = str(Path(verl.__file__).parent / "trainer" / "config")


def composed(*overrides: str, relex: str | None = "default") -> DictConfig:
    """The configuration of a run of 100 steps; `relex` is the option of `+relex=`, None leaves it out."""
    chosen = [] if relex is None else [f"+relex={relex}"]
    with initialize_config_dir(CONFIG, version_base=None):
        return compose("ppo_trainer", [*chosen, "trainer.total_training_steps=100", *overrides])
