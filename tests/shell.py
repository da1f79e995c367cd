"""The commands as a user types them, and a finished run to type them about."""

import json
import shutil

import pytest
import torch
from fakes import DriftingModel, RankSource, tiny_base
from safetensors.torch import save_file
from typer.testing import CliRunner

from relex_verl.cli import app
from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.kinds import KINDS

STEPS = (1, 2, 3, 4, 6, 8)


def call(*arguments):
    """What a command prints, and its exit code."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def json_of(*arguments):
    """What it prints with --json."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments):
    """The one line in which it says what is wrong."""
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def weights(folder):
    """All tensors of a checkpoint."""
    checkpoint = BaseCheckpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.entries}


def same(here, there):
    """Whether two checkpoints hold the same bits."""
    ours, theirs = weights(here), weights(there)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its base, and its trajectory up to step 6 by the command itself."""
    root = tmp_path_factory.mktemp("run")
    start = tiny_base(root / "base")
    model = DriftingModel(weights(start), rate=3e-4)
    for step in STEPS:
        folder = root / "run" / f"global_step_{step}"
        shutil.copytree(start, folder)
        save_file({n: w.bfloat16() for n, w in model.at(step).items()}, folder / "model.safetensors", {"format": "pt"})
    there = ("--base", start, "--checkpoints", root / "run")
    assert json_of("ingest", *there, "--out", root / "trajectory", "--steps", "1-6")["steps"] == [1, 2, 3, 4, 6]
    assert json_of("ingest", *there, "--out", root / "whole")["steps"] == list(STEPS)
    return root


@pytest.fixture(scope="module")
def sketch(finished):
    """The same run, of which only a sketch was kept."""
    model = DriftingModel(weights(finished / "base"), rate=3e-4)
    observer = Observer(finished / "sketch", str(finished / "base"), {}, {}, KINDS["sketch-4"])
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    for step in STEPS[:-1]:
        observer.observe(step, RankSource(model.at(step)))
    observer.save()
    return finished / "sketch"
