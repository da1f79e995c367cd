"""The commands, as a user types them: what they write, what they print, and one clear line where something is wrong."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from fakes import DriftingModel, tiny_base
from safetensors.torch import save_file
from typer.testing import CliRunner

from relex_verl import sharing
from relex_verl.cli import app
from relex_verl.hf_checkpoint import BaseCheckpoint

STEPS = (1, 2, 3, 4, 6, 8)


def call(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})


def json_of(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def weights(folder):
    checkpoint = BaseCheckpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.entries}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its base, and its trajectory up to step 6 by the command itself."""
    root = tmp_path_factory.mktemp("run")
    start = tiny_base(root / "base")
    model = DriftingModel(weights(start), rate=1e-3)
    for step in STEPS:
        folder = root / "run" / f"global_step_{step}"
        shutil.copytree(start, folder)
        save_file({n: w.bfloat16() for n, w in model.at(step).items()}, folder / "model.safetensors", {"format": "pt"})
    ingested = (
        "ingest",
        "--base",
        start,
        "--checkpoints",
        root / "run",
        "--out",
        root / "trajectory",
        "--steps",
        "1-6",
    )
    assert json_of(*ingested)["steps"] == [1, 2, 3, 4, 6]
    assert "0 added" in call(*ingested).stdout
    return root


def test_every_command_explains_itself():
    for command in app.registered_commands:
        result = call(command.name or command.callback.__name__, "--help")
        assert result.exit_code == 0
        assert command.callback.__doc__.split("\n")[0][:20] in result.output


def test_info_and_checkout(run, tmp_path):
    assert json_of("info", run / "trajectory")["steps"] == [1, 2, 3, 4, 6]
    assert "random walk" in call("info", run / "trajectory").stdout
    assert json_of("checkout", run / "trajectory", "--step", 4, "--out", tmp_path / "c")["max_error"] == 0
    true = weights(run / "run/global_step_4")
    assert all(torch.equal(tensor, true[name]) for name, tensor in weights(tmp_path / "c").items())


def test_extrapolate_and_sweep_agree_and_the_manifest_can_be_walked(run, tmp_path):
    call("extrapolate", run / "trajectory", "--t-cut", 4, "--target", "8,12", "--out", tmp_path / "e")
    grid = ("sweep", run / "trajectory", "--t-cut", "3,4", "--target", "4,8,12", "--out", tmp_path / "s")
    assert len(json_of(*grid)["predictions"]) == 5
    manifest = json.loads((tmp_path / "s/manifest.json").read_text())
    rows = {(row["t_cut"], row["target"]): tmp_path / "s" / row["path"] for row in manifest["predictions"]}
    assert sorted(rows) == [(3, 4), (3, 8), (3, 12), (4, 8), (4, 12)]
    assert json.loads((rows[4, 8] / "relex.json").read_text())["observed_steps"] == [1, 2, 3, 4]
    here, there = weights(rows[4, 8]), weights(tmp_path / "e/relex-step_8")
    assert all(torch.equal(here[name], there[name]) for name in here)
    before = (rows[3, 12] / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(rows[4, 12])
    assert call(*grid).exit_code == 0
    assert (rows[3, 12] / "model.safetensors").stat().st_mtime_ns == before
    assert (rows[4, 12] / "relex.json").exists()


def test_reconstruct_at_full_rank_is_the_checkpoint(run, tmp_path):
    assert call("reconstruct", run / "trajectory", "--step", 4, "--rank", 5, "--out", tmp_path / "r").exit_code == 0
    true, full = weights(run / "run/global_step_4"), weights(tmp_path / "r")
    assert all(torch.allclose(full[name].float(), true[name].float(), atol=1e-6) for name in true)
    assert call("reconstruct", run / "trajectory", "--step", 4, "--out", tmp_path / "r1").exit_code == 0
    one = weights(tmp_path / "r1")
    assert any(not torch.equal(one[name], true[name]) for name in true)


def test_diagnose_and_backtest(run, tmp_path):
    found = json_of("diagnose", run / "trajectory", "--out", tmp_path / "d", "--target", "20")
    assert {"coefficients", "components", "spectrum", "r2_by_layer"} <= set(found["figures"])
    frozen = next(row for row in found["tensors"] if row["tensor"] == "model.norm.weight")
    assert frozen["line_r2"] is None
    assert len(list((tmp_path / "d").glob("*.svg"))) == len(list((tmp_path / "d").glob("*.png"))) >= 5
    assert "random walk" in call("diagnose", run / "trajectory").stdout
    rows = json_of("backtest", run / "trajectory", "--out", tmp_path / "b")["rows"]
    assert {row["method"] for row in rows} == {"relex", "anchored", "two-point"}
    assert (tmp_path / "b/backtest.png").exists()
    assert "keeping" in call("backtest", run / "trajectory").stdout


def test_compare_measures_what_dense_vectors_say(run, tmp_path):
    arguments = ("compare", run / "trajectory", "--checkpoints", run / "run", "--t-cut", 4, "--out", tmp_path / "c")
    found = json_of(*arguments)
    assert len(found["figures"]) == 2
    call("extrapolate", run / "trajectory", "--t-cut", 4, "--target", 8, "--out", tmp_path / "e")
    base, true, guess = (weights(f) for f in (run / "base", run / "run/global_step_8", tmp_path / "e/relex-step_8"))
    name = "model.layers.1.mlp.up_proj.weight"
    one = (true[name].double() - base[name].double()).flatten()
    two = (guess[name].double() - base[name].double()).flatten()
    row = next(row for row in found["tensors"] if (row["method"], row["step"]) == ("relex", 8))
    at = found["names"].index(name)
    assert row["cosine"][at] == pytest.approx(float(one @ two / one.norm() / two.norm()), rel=0.01)
    assert row["ratio"][at] == pytest.approx(float(two.norm() / one.norm()), rel=0.01)
    inside = [row for row in found["rows"] if row["method"] == "reconstruction"]
    assert [row["step"] for row in inside] == [1, 2, 3, 4]
    assert inside[-1]["cosine"] > 0.9
    assert "reconstruction" in call(*arguments).stdout


def test_plan():
    for arguments, bytes_a_parameter in (
        (("--trajectory", "bf16", "--change-rate", "0.01"), 2 + 75 * 0.04),
        (("--trajectory", "fp32", "--quantization", "none", "--observe-every", "25"), 4 + 3 * 4),
    ):
        found = json_of("plan", "--params", "8e9", "--ranks", 8, "--t-cut", 75, *arguments)
        assert found["bytes_a_parameter"] == pytest.approx(bytes_a_parameter)
        assert found["memory_a_node"] == pytest.approx(8e9 * bytes_a_parameter, rel=1e-6)
    assert "memory a node" in call("plan", "--params", "8e9", "--t-cut", "75").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("extrapolate", "TRAJECTORY", "--t-cut", 4, "--target", 3, "--out", "OUT"),
            "--target 3 is not after --t-cut 4",
        ),
        (("extrapolate", "TRAJECTORY", "--t-cut", 4, "--target", "x", "--out", "OUT"), "--target x: give whole"),
        (
            ("extrapolate", "TRAJECTORY", "--t-cut", 4, "--target", 8, "--method", "?", "--out", "OUT"),
            "--method ?: give",
        ),
        (("checkout", "TRAJECTORY", "--step", 5, "--out", "OUT"), "step 5 was not observed"),
        (("reconstruct", "TRAJECTORY", "--step", 5, "--out", "OUT"), "--step 5 is not among"),
        (("sweep", "TRAJECTORY", "--t-cut", 4, "--target", "2,3", "--out", "OUT"), "no step after"),
        (("info", "OUT"), "holds no trajectory"),
        (("ingest", "--base", "BASE", "--out", "OUT"), "either --checkpoints"),
        (("ingest", "--base", "BASE", "--checkpoints", "OUT", "--out", "OUT"), "no such folder"),
        (("plan", "--params", "8e9", "--t-cut", 75, "--observe-every", "often"), "--observe-every often: give auto"),
        (("plan", "--params", "8e9", "--t-cut", 75, "--trajectory", "fp8"), "fp32, bf16"),
        (("push", "BASE", "a/b"), "no relex.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, tmp_path, arguments, says):
    places = {"TRAJECTORY": run / "trajectory", "BASE": run / "base", "OUT": tmp_path / "out"}
    result = call(*(places.get(one, one) for one in arguments))
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "steps"), [("5", [5]), ("200,400,...,1000", [200, 400, 600, 800, 1000]), ("9, 3,3", [3, 9])]
)
def test_lists_of_steps(text, steps):
    from relex_verl.cli.common import steps_of

    assert steps_of(text, "--target") == steps


class StandInApi:
    """In place of huggingface_hub.HfApi: remembers what would be uploaded."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo, options["private"]))
        return f"https://hub.test/{repo}"

    def upload_folder(self, **options):
        self.calls.append(("folder", options["folder_path"]))

    def upload_file(self, **options):
        self.calls.append(("card", options["path_or_fileobj"].decode()))

    def model_info(self, name):
        return SimpleNamespace(card_data=SimpleNamespace(license="apache-2.0"))


def test_push_uploads_with_a_card(run, tmp_path, monkeypatch):
    out = tmp_path / "relex/predicted"
    call("extrapolate", run / "trajectory", "--t-cut", 4, "--target", 8, "--out", out)
    api = StandInApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    assert "https://hub.test/me/model" in call("push", out / "relex-step_8", "me/model", "--private").stdout
    assert api.calls[0] == ("create", "me/model", True)
    assert api.calls[1] == ("folder", str(out / "relex-step_8"))
    card = api.calls[2][1]
    for said in ("license: apache-2.0", "step 8", "1-4", "Nobody scored it", "relex, rank 1"):
        assert said in card, card
    assert str(run) not in card
    scores = [{"name": "relex-step_8", "score": 0.71}, {"name": "hold", "score": 0.7}]
    (tmp_path / "relex/report.json").write_text(json.dumps({"validation_scores": scores}))
    sharing.push(out / "relex-step_8", "me/model", api=api)
    assert "| relex-step_8 | 0.71 |" in api.calls[-1][1]
