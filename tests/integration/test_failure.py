"""RELEX breaks, the training does not: injected faults, and refusals before the first step."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from harness import Run, command, data, environment, run

pytestmark = [pytest.mark.trainer, pytest.mark.timeout(1200)]

RELEX = ["relex.t_cut=2", "relex.targets=[8]", "relex.observe_every=1", "relex.validate_targets=false"]
WITH_FAULTS = "verl_cpu,faults"


STEPS = 5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without RELEX; verl validates the last step."""
    return run(tmp_path_factory.mktemp("plain"), STEPS, relex=None, extra=[f"trainer.test_freq={STEPS}"])


def trained_as(plain: Run, finished: Run, steps: int) -> None:
    """Check that training went on to its last step as if RELEX were off."""
    assert finished.code == 0, finished.log[-3000:]
    assert finished.trained() == {step: values for step, values in plain.trained().items() if step <= steps}
    assert len(finished.trained()) == steps


@pytest.mark.parametrize(
    "fault",
    [
        "relex_verl.pipeline.observer:Observer.observe",
        "relex_verl.reporting.metrics:fit_report",
        "relex_verl.pipeline.observer:Observer.write_prediction",
    ],
)
def test_a_fault_switches_relex_off_and_nothing_else(plain: Run, fault: str, tmp_path: Path) -> None:
    env = {"VERL_USE_EXTERNAL_MODULES": WITH_FAULTS, "FAULT": fault}
    finished = run(tmp_path, 3, env=env, relex=RELEX)
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


def test_without_a_validation_set_nothing_is_recommended(plain: Run, tmp_path: Path) -> None:
    """verl loads no empty file, but leaves out what is too long."""
    _, validation = data.write(tmp_path / "data")
    long = pd.read_parquet(validation)
    long["prompt"] = [[{"role": "user", "content": "1+" * 50 + "1="}] for _ in range(len(long))]
    long.to_parquet(tmp_path / "long.parquet")
    extra = [
        f"data.val_files={tmp_path / 'long.parquet'}",
        "data.val_batch_size=1",
        "data.filter_overlong_prompts=True",
    ]
    finished = run(tmp_path, 3, relex=["relex.t_cut=2", "relex.targets=[8]", "relex.on_cut=stop"], extra=extra)
    trained_as(plain, finished, 3)
    assert finished.complaints() == []
    report = finished.report()
    assert report["advice"]["action"] == "unscored"
    assert "the validation set is empty" in report["advice"]["reason"]
    assert (tmp_path / "relex" / "predicted" / "relex-step_8" / "model.safetensors").exists()


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
