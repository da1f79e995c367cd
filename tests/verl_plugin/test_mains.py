"""Which mains lead to verl's v1 trainer, told from sources as people write them."""

import importlib
import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import verl.trainer.main_ppo
from verl.trainer.ppo import v1

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.mains import V1, VERLS_MAIN, check_main

numbers = itertools.count()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Writes a package, imports its `train`, and hands out the `main` in it."""
    package = f"project_{next(numbers)}"
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(train: str, **others: str) -> Any:
        (tmp_path / package).mkdir()
        for name, source in {"train": train, **others}.items():
            (tmp_path / package / f"{name}.py").write_text(source.replace("PACKAGE", package))
        importlib.invalidate_caches()
        return importlib.import_module(f"{package}.train").main

    return write


BY_RUN_PPO = """
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
def main(config):
    run_ppo(config, task_runner_class=TaskRunnerV1)
"""
RENAMED = """
def main(config):
    from verl.trainer.main_ppo import TaskRunnerV1 as Runner, run_ppo
    run_ppo(config, Runner)
"""
BY_THE_MODULE = """
import verl.trainer.main_ppo as ppo
def main(config):
    ppo.run_ppo(config, ppo.TaskRunnerV1)
"""
BY_VERLS_MAIN = """
from verl.trainer.main_ppo import main as train
def main(config):
    config.trainer.project_name = "ours"
    train(config)
"""
BY_VERLS_MAIN_IN_ITS_MODULE = """
from verl.trainer import main_ppo
def main(config):
    main_ppo.main(config)
"""
A_RUNNER_OF_ITS_OWN = """
class Runner:
    def run(self, config):
        from verl.trainer.ppo.v1 import get_trainer_cls
        get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
def main(config):
    Runner().run(config)
"""
A_LARGER_RUNNER = """
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    def run(self, config):
        print("here we go")
        super().run(config)
def main(config):
    run_ppo(config, Runner)
"""
RELATIVE = """
def main(config):
    from .start import start
    start(config)
"""
ABSOLUTE = """
import PACKAGE.start
def main(config):
    PACKAGE.start.start(config)
"""
START = BY_RUN_PPO.replace("main(", "start(")


@pytest.mark.parametrize(
    "source",
    [BY_RUN_PPO, RENAMED, BY_THE_MODULE, BY_VERLS_MAIN, BY_VERLS_MAIN_IN_ITS_MODULE, A_RUNNER_OF_ITS_OWN, A_LARGER_RUNNER],
)  # fmt: skip
def test_a_main_of_ones_own_that_starts_the_v1_trainer_passes(project: Callable[..., Any], source: str) -> None:
    check_main(project(source))


@pytest.mark.parametrize("source", [RELATIVE, ABSOLUTE])
def test_it_may_do_so_in_another_file(project: Callable[..., Any], source: str) -> None:
    check_main(project(source, start=START))


ANOTHER_TRAINER = """
from verl.trainer.main_ppo import run_ppo
class Runner:
    def run(self, config): ...
def main(config):
    run_ppo(config, task_runner_class=Runner)
"""
ANOTHER_RUN = """
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
class Runner(TaskRunnerV1.__ray_metadata__.modified_class):
    def run(self, config): ...
def main(config):
    run_ppo(config, task_runner_class=Runner)
"""
V0 = """
from verl.trainer.main_ppo import run_ppo
from verl.trainer.main_ppo_v0 import TaskRunner
def main(config):
    run_ppo(config, task_runner_class=TaskRunner)
"""


@pytest.mark.parametrize(
    ("source", "others"),
    [
        (ANOTHER_TRAINER, {}),
        (ANOTHER_RUN, {}),
        (V0, {}),
        ("def main(config): ...", {}),
        (RELATIVE, {"start": ANOTHER_TRAINER.replace("main(", "start(")}),
        ("def main(config): ...", {"unused": BY_RUN_PPO}),
    ],
)
def test_another_trainer_is_refused(project: Callable[..., Any], source: str, others: dict[str, str]) -> None:
    main = project(source, **others)
    with pytest.raises(
        ConfigError, match=rf"main='{main.__module__}': it does not start verl's v1 trainer.*TaskRunnerV1"
    ):
        check_main(main)


@pytest.mark.parametrize(
    "name", ["verl.experimental.fully_async_policy.fully_async_main", "verl.experimental.one_step_off_policy.main_ppo"]
)
def test_verls_other_mains_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"main='{name}'"):
        check_main(importlib.import_module(name).main)


def test_verls_own_main_passes_whatever_it_is_called() -> None:
    assert verl.trainer.main_ppo.__name__ == VERLS_MAIN
    check_main(verl.trainer.main_ppo.main)


def test_the_names_are_verls() -> None:
    assert {"TaskRunnerV1"} == {name for name in V1 if hasattr(verl.trainer.main_ppo, name)}
    assert {"get_trainer_cls"} == {name for name in V1 if hasattr(v1, name)}


def test_a_main_without_a_source_is_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    there: dict[str, Any] = {"__name__": "typed"}
    exec("def main(config): ...", there)
    with caplog.at_level(logging.WARNING, "relex_verl"):
        check_main(there["main"])
    assert "runs only if typed starts verl's v1 trainer" in caplog.text


def test_nothing_of_the_project_is_executed(project: Callable[..., Any]) -> None:
    main = project(RELATIVE, start=START + "\nraise SystemExit('executed')\n")
    check_main(main)
    assert f"{main.__module__.split('.')[0]}.start" not in sys.modules
