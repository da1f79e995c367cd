"""All commands: they explain themselves, say what is wrong in one line, and read lists of steps, methods and tensors."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shell import call, finished, refused
from typer.main import get_command

from relex_verl.cli import COMMANDS, app
from relex_verl.cli.arguments import steps_of, tensors_of
from relex_verl.cli.screen import table_of

__all__ = ["finished"]


def test_every_command_explains_itself():
    """The list of commands says what each says of itself; it is made without loading them, or torch."""
    listed = " ".join(call("--help").output.split())
    group = get_command(app)
    for name, (_, summary) in COMMANDS.items():
        assert call(name, "--help").exit_code == 0
        assert group.get_command(None, name).help.strip().split("\n")[0] == summary
        assert f"{name} " in listed
        assert summary[:20] in listed
    code = (
        "import sys\nfrom relex_verl.cli import app\ntry:\n app(['--help'])\nfinally:\n print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("extrapolate TRAJECTORY --t-cut 4 --target 3 --out OUT", "--target 3 is not after --t-cut 4"),
        ("extrapolate TRAJECTORY --t-cut 4 --target x --out OUT", "--target x: give whole"),
        ("extrapolate TRAJECTORY --t-cut 4 --target 8 --method ? --out OUT", "--method ?: give"),
        ("extrapolate TRAJECTORY --t-cut 8 --target 9 --out OUT", "--t-cut 8: the last observed step is 6"),
        ("extrapolate TRAJECTORY --t-cut 4 --target 8 --fit-from 4 --out OUT", "needs 2 observed steps from 4 on"),
        ("checkout TRAJECTORY --step 5 --out OUT", "step 5 was not observed"),
        ("reconstruct TRAJECTORY --step 5 --out OUT", "--step 5 is not among"),
        ("reconstruct TRAJECTORY --step 4 --t-cut 50 --out OUT", "--t-cut 50: the last observed step is 6"),
        ("diagnose TRAJECTORY --t-cut 50 --out OUT", "--t-cut 50: the last observed step is 6"),
        ("diagnose TRAJECTORY --fit-from 7 --out OUT", "--fit-from 7: no row is left"),
        ("diagnose TRAJECTORY --tensor nose --out OUT", "--tensor nose: no tensors are called so"),
        ("diagnose TRAJECTORY --tensor mlp --out OUT", "--tensor mlp: 6 tensors are called so"),
        ("backtest TRAJECTORY --t-cut 50 --out OUT", "--t-cut 50: the last observed step is 6"),
        ("backtest TRAJECTORY --fit-from 6 --out OUT", "holds 1 observed steps"),
        ("sweep TRAJECTORY --t-cut 4 --target 2,3 --out OUT", "no step after"),
        ("sweep TRAJECTORY --t-cut 4,5 --target 9 --out OUT", "--t-cut 4 and 5 see the same observed steps"),
        ("sweep TRAJECTORY --t-cut 4,50 --target 99 --out OUT", "--t-cut 50: the last observed step is 6"),
        ("compare TRAJECTORY --t-cut 6 --out OUT", "no such step after --t-cut 6, only 1-4, 6"),
        ("compare TRAJECTORY --t-cut 6 --checkpoints RUN --steps 7 --out OUT", "the steps found are 8"),
        ("compare TRAJECTORY --t-cut 4 --checkpoints RUN --hub a/b", "either --checkpoints"),
        ("compare WHOLE --t-cut 8 --checkpoints RUN --out OUT", "no step after --t-cut 8, only 1-4, 6, 8"),
        ("baseline transformer TRAJECTORY --t-cut 9 --target 20 --out OUT", "--t-cut 9: the last observed step is 6"),
        ("info OUT", "holds no trajectory"),
        ("ingest --base BASE --out OUT", "either --checkpoints"),
        ("ingest --base BASE --checkpoints OUT --out OUT", "no such folder"),
        ("ingest --base BASE --checkpoints RUN --out OUT --trajectory fp8", "--trajectory fp8: give one of"),
        ("ingest --base /moved/base --checkpoints RUN --out OUT", "/moved/base is no folder"),
        ("plan --params 8e9 --t-cut 75 --observe-every often", "relex.observe_every='often': give auto"),
        ("plan --params 8e9 --t-cut 75 --trajectory fp8", "fp32, bf16"),
        ("push BASE a/b", "no relex.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(finished, tmp_path, arguments, says):
    places = {"TRAJECTORY": finished / "trajectory", "WHOLE": finished / "whole", "BASE": finished / "base"}
    places |= {"RUN": finished / "run", "OUT": tmp_path / "out"}
    assert says in refused(*(places.get(one, one) for one in arguments.split()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("5", [5]),
        ("200,400,...,1000", [200, 400, 600, 800, 1000]),
        ("200,...,500", [200, 300, 400, 500]),
        ("9, 3,3", [3, 9]),
    ],
)
def test_lists_of_steps(text, steps):
    assert steps_of(text, "--target") == steps


@given(st.integers(1, 500), st.integers(1, 50), st.integers(2, 20))
def test_a_range_of_steps_goes_on_as_it_began(first, stride, count):
    text = f"{first},{first + stride},...,{first + count * stride}"
    assert steps_of(text, "--target") == list(range(first, first + count * stride + 1, stride))


@pytest.mark.parametrize("text", ["", "x", "3,", "...,5", "5,3,...,9", "5,...", "0", "-3", "1.5"])
def test_no_lists_of_steps(text):
    with pytest.raises(ValueError, match="--target"):
        steps_of(text, "--target")


def test_tensors_are_named_whole_or_by_what_only_they_have():
    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (1, 14) for part in ("gate", "up")]
    assert tensors_of("14.mlp.gate_proj", names) == [names[2]]
    assert tensors_of(f"{names[0]}, 14.mlp.up", names) == [names[0], names[3]]
    with pytest.raises(ValueError, match="--tensor gate: 2 tensors are called so"):
        tensors_of("gate", names)


def test_a_table_in_a_pipe_is_as_wide_as_its_names():
    """rich would cut them at 80 columns."""
    name = "model.layers.14.mlp." + "gate" * 40
    assert len(table_of("wide", [{"tensor": name}]).columns) == 1
    code = f"from relex_verl.cli.screen import *; console.print(table_of('wide', [{{'tensor': '{name}'}}]))"
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert name in done.stdout


@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_patiently_unless_the_user_says_otherwise(chosen, expected):
    """libgomp reads it once, when torch is loaded."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    # Without typer the import ends right after what has to come first.
    code = "import os, sys\nsys.modules['typer'] = None\ntry:\n import relex_verl.cli\nexcept ImportError:\n pass\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [expected, "False"]
