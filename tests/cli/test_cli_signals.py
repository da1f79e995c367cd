"""A command that is ended from outside: nothing half-written stays, it says what is kept, and the next goes on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from shell import call, finished

__all__ = ["finished"]


def started(*arguments):
    command = [sys.executable, "-m", "relex_verl", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_ended_from_outside(finished, tmp_path, number, code):
    """The second checkpoint is a pipe that nobody writes to: the command waits for it, with one step recorded."""
    run = tmp_path / "run"
    for step in (1, 2):
        (run / f"step_{step}").mkdir(parents=True)
    torch.save(load_file(finished / "run/global_step_1/model.safetensors"), run / "step_1/pytorch_model.bin")
    os.mkfifo(run / "step_2/pytorch_model.bin")
    there = ("ingest", "--base", finished / "base", "--checkpoints", run, "--out", tmp_path / "t", "--allow-pickle")
    process = started(*there)
    until = time.monotonic() + 120
    while not (tmp_path / "t/index.json").exists() or '"1"' not in (tmp_path / "t/index.json").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)
    assert "is being written by another command" in call(*there).stderr
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "steps 1 are kept" in said
    assert "run the same command again" in said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_command_left_is_removed_by_the_next(finished, tmp_path):
    left = tmp_path / ".relex-step_99.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".mine.partial").mkdir()
    (tmp_path / ".mine.partial/notes.txt").write_text("mine")
    assert call("extrapolate", finished / "trajectory", "--t-cut", 4, "--target", 8, "--out", tmp_path).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.partial", "relex-step_8"]


def test_files_follow_the_umask_and_brackets_are_no_markup(finished, tmp_path):
    out = tmp_path / "[bold]runs[red]"
    there = ("--base", finished / "base", "--checkpoints", finished / "run", "--out", out / "t", "--steps", "1-4")
    said = call("ingest", *there)
    assert str(out / "t") in said.stdout
    assert call("checkout", out / "t", "--step", 3, "--out", out / "c").exit_code == 0
    assert str(out) in call("info", out / "nothing").stderr
    mask = os.umask(0)
    os.umask(mask)
    for file in out.rglob("*"):
        if file.is_file():
            assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file
