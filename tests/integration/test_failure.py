"""RELEX breaks, the training does not: injected faults, and refusals before the first step."""

import subprocess
import sys
from pathlib import Path

import pytest
from harness import Run, command, environment, run

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(1200)]

RELEX = ["relex.t_cut=2", "relex.targets=[8]", "relex.observe_every=1", "relex.validate_targets=false"]
WITH_FAULTS = "verl_cpu,faults"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps without RELEX."""
    return run(tmp_path_factory.mktemp("plain"), 3, relex=None)


@pytest.mark.parametrize(
    "fault", ["relex_verl.observer:Observer._encode", "relex_verl.observer:Observer.write_prediction"]
)
def test_a_fault_switches_relex_off_and_nothing_else(plain: Run, fault: str, tmp_path: Path) -> None:
    env = {"VERL_USE_EXTERNAL_MODULES": WITH_FAULTS, "FAULT": fault}
    finished = run(tmp_path, 3, env=env, relex=RELEX)
    assert finished.code == 0, finished.log[-3000:]
    assert finished.trained() == plain.trained()
    assert len(finished.trained()) == 3
    assert len(finished.complaints()) == 1
    assert "OSError: injected: the disk is on fire" in finished.log


def refused(out: Path, *overrides: str) -> str:
    """What a refused run prints, after checking that it trained nothing."""
    line = command(out, 4, relex=[], extra=overrides)
    done = subprocess.run(line, cwd=out, env=environment(out), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert not (out / "metrics.jsonl").exists()
    assert "Started a local Ray instance" not in done.stderr
    return done.stdout + done.stderr


def test_a_wrong_key_is_refused_before_ray_starts(tmp_path: Path) -> None:
    said = refused(tmp_path, "+relex.tcut=3")
    assert "relex.tcut=3: unknown key; did you mean relex.t_cut?" in said
    assert "Traceback" not in said


def test_a_plugin_that_cannot_load_says_so() -> None:
    """At ERROR with the traceback, though verl itself logs it at DEBUG."""
    code = "import sys; sys.modules['wrapt'] = None; import verl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert "relex-verl could not be loaded" in done.stderr
    assert "Traceback" in done.stderr
