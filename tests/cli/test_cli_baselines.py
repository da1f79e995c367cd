import errno
import json
import subprocess
import sys

import pytest
import torch
from fakes import tiny_base
from recorded import by_name
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from relex_verl.cli.baselines import baseline_app
from relex_verl.offline.baselines.alpharl import alpharl
from relex_verl.offline.baselines.coefficient_transformer import TransformerSettings, transformer_tensors
from relex_verl.offline.baselines.next_extrapolation import NextSettings, fit_next, next_tensors
from relex_verl.offline.baselines.weight_extrapolation import weight_extrapolation
from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard, whole
from relex_verl.trajectory.store import Trajectory

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NEXT = ["--interval", "1", "--look-ahead", "2", "--epochs", "3"]


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """Six steps of a tiny tied Qwen2."""
    folder = tmp_path_factory.mktemp("run")
    base = load_file(tiny_base(folder / "base", tied=True) / "model.safetensors")

    def source(step):
        for i, (name, tensor) in enumerate(base.items()):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * step + i))
            moved = tensor.float() + 1e-3 * step + 3e-4 * step * noise if step else tensor.float()
            yield TensorShard(name, tuple(tensor.shape), whole(tensor.shape), moved.flatten())

    observer = Observer(folder / "trajectory", str(folder / "base"), {HEAD: EMBEDDING}, {}, KINDS["fp32-int8"])
    observer.start(list(source(0)))
    observer.open(0)
    for step in range(1, 7):
        observer.observe(step, list(source(step)))
    return Trajectory(folder / "trajectory")


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    path.write_text(json.dumps({"2": 0.2, "4": 0.25, "6": 0.4}))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(baseline_app, [str(one) for one in arguments])


def check(folder, expected, method):
    """It loads as a model, holds what the function gives, and says where it comes from."""
    written = load_file(folder / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor.to(torch.bfloat16)), name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(model.lm_head.weight, written[EMBEDDING])
    provenance = json.loads((folder / "relex.json").read_text())
    assert provenance["method"] == method
    assert provenance["t_cut"] == 6
    assert provenance["observed_steps"] == [1, 2, 3, 4, 5, 6]
    assert {"base_model", "rank", "target", "trajectory", "versions"} <= set(provenance)
    return provenance


def test_weight_extrapolation(trajectory, tmp_path):
    result = run(
        "weight-extrapolation", trajectory.folder, "--t-cut", 6, "--target", "9,20", "--first", 2, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    for step in (9, 20):
        expected = by_name(weight_extrapolation(trajectory, 6, step, 2))
        provenance = check(tmp_path / f"weight-extrapolation-step_{step}", expected, "weight-extrapolation")
        assert provenance["target"] == step
        assert provenance["settings"] == {"first": 2, "copy_norms": True}
    result = run(
        "weight-extrapolation", trajectory.folder, "--t-cut", 6, "--target", 9, "--no-copy-norms", "--out", tmp_path
    )
    assert result.exit_code == 1
    assert "holds another prediction (settings" in " ".join(result.output.split())
    out = tmp_path / "plain"
    result = run(
        "weight-extrapolation", trajectory.folder, "--t-cut", 6, "--target", "9,...,9", "--no-copy-norms", "--out", out
    )
    assert result.exit_code == 0, result.output
    plain = by_name(weight_extrapolation(trajectory, 6, 9, copy_norms=False))
    check(out / "weight-extrapolation-step_9", plain, "weight-extrapolation")


def test_transformer(trajectory, tmp_path):
    result = run("transformer", trajectory.folder, "--t-cut", 6, "--target", 9, "--epochs", 2, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    expected = by_name(transformer_tensors(trajectory, 6, 9, TransformerSettings(epochs=2)))
    check(tmp_path / "transformer-step_9", expected, "transformer")


def test_alpharl(trajectory, scores, tmp_path):
    arguments = ["alpharl", trajectory.folder, "--t-cut", 6, "--scores", scores]
    result = run(*arguments, "--wanted", "0.5,0.8", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)["predictions"]
    assert [row["path"] for row in written] == [str(tmp_path / f"alpharl-score_{score}") for score in (0.5, 0.8)]
    by_step = {2: 0.2, 4: 0.25, 6: 0.4}
    for wanted in (0.5, 0.8):
        check(tmp_path / f"alpharl-score_{wanted}", by_name(alpharl(trajectory, 6, by_step, wanted)), "alpharl")
    assert run(*arguments, "--wanted", "0.5", "--add-to", "last", "--out", tmp_path / "last").exit_code == 0
    check(tmp_path / "last/alpharl-score_0.5", by_name(alpharl(trajectory, 6, by_step, 0.5, "last")), "alpharl")


def test_next(trajectory, tmp_path):
    result = run("next", trajectory.folder, "--t-cut", 6, "--coefficient", "0.5,2", *NEXT, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    fit = fit_next(trajectory, 6, NextSettings(1, 2, epochs=3))
    for coefficient, step in ((0.5, 7), (2, 10)):
        provenance = check(tmp_path / f"next-step_{step}", by_name(next_tensors(trajectory, fit, coefficient)), "next")
        assert provenance["settings"]["look_ahead"] == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["transformer", "--t-cut", "6", "--target", "6"], "not after --t-cut"),
        (["transformer", "--t-cut", "6", "--target", "x"], "whole step numbers separated by commas"),
        (["next", "--t-cut", "6", "--coefficient", "x"], "numbers separated by commas"),
        (["transformer", "--t-cut", "2", "--target", "9"], "3 observed steps"),
        (["weight-extrapolation", "--t-cut", "6", "--target", "9", "--first", "8"], "later than the first"),
        (["next", "--t-cut", "6"], "needs step -4 besides"),
        (["alpharl", "--t-cut", "6", "--scores", "nowhere.json", "--wanted", "1"], "nowhere.json"),
        (["alpharl", "--t-cut", "6", "--scores", __file__, "--wanted", "1"], "has to be a JSON object"),
    ],
)
def test_what_a_user_can_mend_is_said_in_a_line(trajectory, tmp_path, arguments, says):
    result = run(arguments[0], trajectory.folder, *arguments[1:], "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_is_one_line_and_leaves_nothing(trajectory, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    result = run("weight-extrapolation", trajectory.folder, "--t-cut", 6, "--target", 9, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_importing_the_commands_loads_neither_scikit_learn_nor_transformers():
    code = "import sys, relex_verl.cli.baselines; print('sklearn' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "False"]
