"""RELEX breaks, the training does not: injected faults, and refusals before the first step."""

import subprocess
import sys
from pathlib import Path

from harness import STEPS, Run, command, environment, run

WITH_FAULTS = "verl_cpu,faults"


def trained_as(plain: Run, finished: Run, steps: int) -> None:
    """Check that training went on to its last step as if RELEX were off."""
    assert finished.code == 0, finished.log[-3000:]
    assert finished.trained() == {step: values for step, values in plain.trained().items() if step <= steps}
    assert len(finished.trained()) == steps


def test_a_fault_switches_relex_off_and_nothing_else(plain: Run, tmp_path: Path) -> None:
    """The first row's file; what fails in a fit or a prediction goes the same way (tests/run/test_callback.py)."""
    env = {"VERL_USE_EXTERNAL_MODULES": WITH_FAULTS, "FAULT": "relex_verl.trajectory.files:save_tensors"}
    relex = ["relex.t_cut=2", "relex.targets=[8]", "relex.observe_every=1", "relex.validate_targets=false"]
    finished = run(tmp_path, 3, env=env, relex=relex)
    trained_as(plain, finished, 3)
    assert len(finished.complaints()) == 1
    assert "OSError: injected: the disk is on fire" in finished.log


def test_a_validation_that_hangs_is_given_up(plain: Run, tmp_path: Path) -> None:
    """With all of its answers outstanding: training and verl's own later validation never see any of them."""
    env = {"VERL_USE_EXTERNAL_MODULES": WITH_FAULTS, "FAULT_SCORING": "hang", "FAULT_MARKER": str(tmp_path / "scoring")}
    scored = ["relex.t_cut=2", "relex.targets=[8]", "relex.on_cut=stop", "relex.validation_timeout_s=8"]
    finished = run(tmp_path, STEPS, env=env, relex=scored, extra=[f"trainer.test_freq={STEPS}"])
    trained_as(plain, finished, STEPS)
    assert finished.complaints() == []
    assert "nothing is recommended" in finished.log
    advice = finished.report()["advice"]
    assert advice["action"] == "unscored"
    assert "ValidationTimeout: the validation took longer than relex.validation_timeout_s=8" in advice["reason"]
    validated = {name: value for name, value in finished.metrics[STEPS].items() if name.startswith("val-core")}
    assert validated
    assert validated == {name: value for name, value in plain.metrics[STEPS].items() if name.startswith("val-core")}


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
