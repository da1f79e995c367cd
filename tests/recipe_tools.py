"""What the tests of the recipes for GPUs share: composing their configurations, running their scripts and modules."""

import copy
import functools
import importlib.util
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
MATH = ROOT / "recipes" / "math"
# recipe -> what the paper does with RELEX: (cut, target)
RECIPES = {
    "qwen2_5_math_1_5b": (75, 500),
    "qwen3_4b_base": (75, 500),
    "qwen3_8b_base": (100, 750),
    "qwen3_8b_base_megatron": (100, 750),
    "qwen3_8b_base_separate_async": (100, 750),
}


def composed(name: str, overrides: list[str]) -> DictConfig:
    """What main_ppo composes from `--config-dir configs --config-name NAME OVERRIDES`."""
    return copy.deepcopy(_composed(name, *overrides))


@functools.cache
def _composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(name, overrides=[*overrides, "hydra.searchpath=[pkg://verl.trainer.config]"])


def check_by_verl(config: DictConfig) -> None:
    """Everything verl resolves and checks before it starts Ray."""
    OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    # The one value that verl's own ppo_trainer leaves open, for a reward model that is off.
    assert OmegaConf.missing_keys(config) <= {"reward.reward_model.rollout.name"}
    validate_config(config, need_reference_policy(config), need_critic(config))


def bash(script: str | Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of recipes/math, or any other by its path."""
    return subprocess.run(
        ["bash", str(MATH / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=60,
    )


def verl_commands(dry_run: str) -> list[tuple[str, list[str], dict[str, str]]]:
    """(config name, overrides, environment) of each line that starts verl."""
    found = []
    for line in dry_run.splitlines():
        words = shlex.split(line)
        if "verl.trainer.main_ppo" not in words:
            continue
        start = words.index("verl.trainer.main_ppo")
        assert words[start - 2 : start] == [sys.executable, "-m"]
        assert words[start + 1 : start + 3] == ["--config-dir", str(CONFIGS)]
        assert words[start + 3] == "--config-name"
        environment = dict(word.split("=", 1) for word in words[1 : start - 2])
        found.append((words[start + 4], words[start + 5 :], environment))
    return found


def module(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_math_{name}", MATH / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


def datasets_table() -> dict[str, dict]:
    """datasets.yaml."""
    return yaml.safe_load((MATH / "datasets.yaml").read_text())
