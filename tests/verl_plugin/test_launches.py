"""Commands as people start verl with them, with `+relex=...` appended: each goes as far as verl's `ray.init`, or is refused.

`launches/` holds verl's own examples, a file each, and kinds of launches, shorter, in one. A few go through `python -m`
and Hydra as a whole; the others through verl's schema, Hydra's callback and verl's main in this process.
"""

import importlib
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import pytest
import ray
import verl
from omegaconf import DictConfig, open_dict

from relex_verl.verl_plugin.early_check import EarlyCheck

HERE = Path(__file__).parent
VERL = Path(verl.__file__).parent
MAIN = "verl.trainer.main_ppo"
# Of each main: folder of its configuration, below verl's, and the configuration's name.
CONFIGURATIONS = {
    MAIN: ("trainer/config", "ppo_trainer"),
    "verl.experimental.fully_async_policy.fully_async_main": (
        "experimental/fully_async_policy/config",
        "fully_async_ppo_trainer",
    ),
}


def launches() -> dict[str, dict[str, Any]]:
    """Name -> `main`, `option` of `+relex=`, `overrides`, and `expected`: "passes", or how the refusal begins."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "launches").glob("*.json"))}
    kinds = files.pop("kinds")
    for name, launch in kinds["launches"].items():
        files[name] = {"main": MAIN, **launch, "overrides": [*kinds["common"], *launch["overrides"]]}
    return files


LAUNCHES = launches()


class ReachedRay(Exception):
    """Stands in for Ray: verl's main would start it now."""


def no_ray(**_: Any) -> None:
    raise ReachedRay


@pytest.fixture(autouse=True)
def before_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray and vLLM as stand-ins. verl asks the latter for its largest rank of adapters, and it is not installed here."""
    monkeypatch.setattr(ray, "init", no_ray)
    utils = ModuleType("verl.workers.rollout.vllm_rollout.utils")
    utils.get_vllm_max_lora_rank = lambda rank: rank  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verl.workers.rollout.vllm_rollout", ModuleType("vllm_rollout"))
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    monkeypatch.setenv("HOME", "/nonexistent")  # nobody's data and models
    # verl's other mains look for its configuration below the folder that they are started in.
    monkeypatch.chdir(VERL.parent)


def composed(main: str, overrides: list[str]) -> DictConfig:
    folder, name = CONFIGURATIONS[main]
    named = [one.partition("=")[2] for one in overrides if one.startswith("--config-name=")]
    keys = [one for one in overrides if not one.startswith("--")]
    with hydra.initialize_config_dir(str(VERL / folder), version_base=None):
        return hydra.compose(*(named or [name]), overrides=keys, return_hydra_config=True)


def without_hydra(config: DictConfig) -> DictConfig:
    """What Hydra gives to a main."""
    given = deepcopy(config)
    with open_dict(given):
        del given["hydra"]
    return given


def outcome(main: str, overrides: list[str]) -> str:
    """What Hydra and verl's main do: "passes" when Ray would start, else what the run ends with."""
    config, task = composed(main, overrides), importlib.import_module(main).main
    check = EarlyCheck()
    check.on_run_start(config, config_name=None)
    given = without_hydra(config)
    try:
        check.on_job_start(config, task_function=task)
        task(given)
    except ReachedRay:
        return "passes"
    except SystemExit as refusal:
        return str(refusal)
    return "returns"


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_comes_to_its_outcome(name: str) -> None:
    launch = LAUNCHES[name]
    came_to = outcome(launch["main"], [*launch["overrides"], f"+relex={launch['option']}"])
    if launch["expected"] == "passes":
        assert came_to == "passes"
    else:
        assert came_to.startswith(f"relex-verl: {launch['expected']}: ")
        assert len(came_to) > len(f"relex-verl: {launch['expected']}: ") + 20  # a cure


@pytest.mark.parametrize("name", LAUNCHES)
def test_without_relex_verl_itself_would_start_it(name: str) -> None:
    """What is refused is refused by RELEX, and for one reason."""
    launch = LAUNCHES[name]
    config = without_hydra(composed(launch["main"], launch["overrides"]))
    with pytest.raises(ReachedRay):
        importlib.import_module(launch["main"]).main(config)


# Whole commands, Hydra included.

STOP = """
import os, wrapt

def _stop(ray):
    def init(**_):
        print("REACHED RAY", flush=True)
        os._exit(77)
    ray.init = init

wrapt.register_post_import_hook(_stop, "ray")
"""
OWN_MAIN = """
import hydra

@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):
    from .start import start
    start(config)

if __name__ == "__main__":
    main()
"""
BY_V1 = """
def start(config):
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    run_ppo(config, task_runner_class=TaskRunnerV1)
"""
BY_ANOTHER = """
import ray
from verl.trainer.main_ppo import run_ppo

@ray.remote
class Runner:
    def run(self, config): ...

def start(config):
    run_ppo(config, task_runner_class=Runner)
"""
GRPO = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_dynamic_bsz=True"]


def started(folder: Path, main: str, *arguments: str) -> tuple[int, str]:
    """Exit status (77: Ray would start) and what was printed of `python -m main ...` in an empty folder."""
    (folder / "stop_at_ray.py").write_text(STOP)
    for package, source in (("own", BY_V1), ("another", BY_ANOTHER)):
        (folder / package).mkdir()
        (folder / package / "main.py").write_text(OWN_MAIN)
        (folder / package / "start.py").write_text(source)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", main, *arguments], capture_output=True, text=True, timeout=300, cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "VERL_USE_EXTERNAL_MODULES": "stop_at_ray"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("main", "arguments", "code", "says"),
    [
        (MAIN, ["+relex=default", "trainer.v1.trainer_mode=sync", *GRPO], 77, "REACHED RAY"),
        (
            MAIN,
            ["-m", "+relex=colocate_async", "trainer.v1.trainer_mode=colocate_async", *GRPO, "trainer.save_freq=1,2"],
            77,
            "REACHED RAY",
        ),
        (MAIN, ["+relex=default", "trainer.total_training_steps='100'"], 1, "without quotes"),
        (MAIN, ["+relex=default", "trainer.project_name=${oc.env:NOT_SET}"], 1, "could not be checked"),
        (MAIN, ["+relex=default", "relex.t_cut=-1", "--cfg", "job"], 0, "t_cut: -1"),
        ("own.main", ["+relex=default", *GRPO], 77, "REACHED RAY"),
        ("another.main", ["+relex=default", *GRPO], 1, "main='another.main': it does not start verl's v1 trainer"),
    ],
)
def test_a_command_comes_to_its_outcome(tmp_path: Path, main: str, arguments: list[str], code: int, says: str) -> None:
    ended, printed = started(tmp_path, main, *arguments)
    assert says in printed
    assert ended == code
