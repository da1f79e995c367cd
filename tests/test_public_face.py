"""`relex_verl` as a notebook uses it: what it gives, that its examples are true, and that it costs nothing until then."""

import doctest
import json
import subprocess
import sys

import pytest
import torch
from documentation import PACKAGE, blocks
from finished import predicted, read, write_run
from recorded import moved, random_weights, rank_one_directions, record
from stand_in_hub import serving

import relex_verl
from relex_verl import Diagnosis, Trajectory, diagnose, extrapolate, ingest, reconstruct
from relex_verl.offline import face
from relex_verl.offline.ingest import IngestError
from relex_verl.trajectory.store import TrajectoryError

STEPS = (1, 2, 3, 4, 5, 6)
FUNCTIONS = {function.__name__: function for function in (ingest, extrapolate, reconstruct, diagnose)}
EXAMPLES = {
    "relex_verl": relex_verl.__doc__,
    **{name: function.__doc__ for name, function in FUNCTIONS.items()},
    "docs/offline.md": "\n".join(blocks(PACKAGE / "docs/offline.md", "pycon")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: base/ and run/global_step_<N>/, and its trajectory."""
    root = tmp_path_factory.mktemp("finished")
    write_run(root, STEPS)
    ingest(root / "base", root / "run", root / "recorded")
    return root


@pytest.fixture
def trajectory(run):
    return Trajectory(run / "recorded")


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_true(name, run, trajectory, tmp_path, monkeypatch):
    for folder in ("base", "run"):
        (tmp_path / folder).symlink_to(run / folder)
    monkeypatch.chdir(tmp_path)
    known = {**FUNCTIONS, "trajectory": trajectory}
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], known, name, None, 0)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(said)


# ---------------------------------------------------------------- names


def test_the_face_has_these_names():
    wanted = {"Trajectory", "ingest", "extrapolate", "reconstruct", "METHODS", "diagnose"}
    assert set(relex_verl.__all__) == wanted | {"Diagnosis", "__version__"}
    assert set(relex_verl.__all__) <= set(dir(relex_verl))
    assert all(hasattr(relex_verl, name) for name in relex_verl.__all__)
    with pytest.raises(AttributeError, match=r"relex_verl.*'extrapolates'"):
        relex_verl.extrapolates  # noqa: B018


def test_importing_it_loads_nothing_but_the_standard_library():
    code = "import sys; before = set(sys.modules); import relex_verl; dir(relex_verl)\n"
    code += "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(sys.stdlib_module_names) == {"relex_verl"}


def test_a_type_checker_knows_every_name_and_no_other(tmp_path):
    api = pytest.importorskip("mypy.api")
    script = tmp_path / "notebook.py"
    script.write_text(f"from relex_verl import {', '.join(relex_verl.__all__)}\nfrom relex_verl import extrapolates\n")
    # What stands behind the names is checked by mypy's own run: here torch would take most of a minute.
    options = ["--follow-imports=skip", "--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    said, _, _ = api.run([*options, str(PACKAGE / "__init__.py"), str(script)])
    assert said.count("error:") == 1, said
    assert 'notebook.py:2: error: Module "relex_verl" has no attribute "extrapolates"' in said


# ---------------------------------------------------------------- what the functions do


def test_ingest_takes_steps_in_every_form(run, tmp_path):
    forms = {"text": "1-3,6", "list": [1, 2, 3, 6], "range": range(2, 5), "all": None}
    found = {name: ingest(run / "base", str(run / "run"), tmp_path / name, form) for name, form in forms.items()}
    assert {name: one.steps for name, one in found.items()} == {
        "text": [1, 2, 3, 6], "list": [1, 2, 3, 6], "range": [2, 3, 4], "all": list(STEPS)
    }  # fmt: skip
    assert isinstance(found["all"], Trajectory)
    again = ingest(run / "base", run / "run", tmp_path / "range", range(2, 7))
    assert again.steps == [2, 3, 4, 5, 6]


def test_ingest_passes_its_options_on(run, tmp_path):
    found = ingest(run / "base", run / "run", tmp_path, "1-2", trajectory="fp32", quantization="int4")
    assert found.index.encoding == "fp32-int4"
    with pytest.raises(IngestError, match="give one of"):
        ingest(run / "base", run / "run", tmp_path / "other", trajectory="fp8")


def test_ingest_takes_a_hub_repository(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(run / "run") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        found = ingest(run / "base", "hub:some/run", tmp_path / "out", "1-2")
        with pytest.raises(IngestError, match="no revision named like"):
            ingest(run / "base", "hub:some/run", tmp_path / "other", revisions="iter_{N}")
    assert (found.steps, found.index.run) == ([1, 2], {"ingested_from": "hub:some/run"})


def test_extrapolate_writes_what_the_pipeline_predicts(run, trajectory, tmp_path):
    folder = extrapolate(run / "recorded", 40, out=tmp_path)
    assert folder == tmp_path / "relex-step_40"
    wanted, written = predicted(trajectory, 40), read(folder)
    assert all(torch.equal(written[name].flatten(), wanted[name]) for name in wanted)
    facts = json.loads((folder / "relex.json").read_text())
    assert (facts["t_cut"], facts["target"], facts["observed_steps"]) == (6, 40, list(STEPS))
    assert facts["trajectory"] == str((run / "recorded").resolve())


def test_extrapolate_sees_only_the_fit(trajectory, tmp_path):
    seen = []
    fit = {"t_cut": 4, "method": "anchored", "rank": 2, "fit_from": 2}
    folder = extrapolate(trajectory, 5, **fit, out=str(tmp_path), progress=seen.append)
    facts = json.loads((folder / "relex.json").read_text())
    assert {key: facts[key] for key in fit} == fit
    assert facts["observed_steps"] == [1, 2, 3, 4]
    assert sum(seen) == trajectory.elements


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"target": 40, "method": "relax"}, ValueError, "method relax: give one of relex, anchored"),
        ({"target": 6}, ValueError, "target 6 is not after t_cut 6"),
        ({"target": 40, "t_cut": 9}, TrajectoryError, "the last observed step is 6"),
        ({"target": 40, "fit_from": 7}, ValueError, "from (step )?7 on"),
    ],
)
def test_extrapolate_refuses_and_leaves_nothing(arguments, error, says, trajectory, tmp_path):
    with pytest.raises(error, match=says):
        extrapolate(trajectory, **arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_reconstruction_from_all_directions_is_the_checkpoint(run, trajectory, tmp_path):
    whole = read(reconstruct(trajectory, 5, rank=len(STEPS), out=tmp_path / "whole"))
    true = read(run / "run/global_step_5")
    first = read(reconstruct(trajectory, 5, out=tmp_path / "first"))
    base = read(run / "base")

    def distance(weights):
        return sum((weights[name].double() - true[name].double()).square().sum() for name in true).sqrt().item()

    assert distance(whole) < 0.01 * distance(base)
    assert distance(whole) < 0.1 * distance(first) < 0.1 * distance(base)
    assert json.loads((tmp_path / "first/relex.json").read_text())["method"] == "reconstruction"
    with pytest.raises(TrajectoryError, match="7"):
        reconstruct(trajectory, 7, out=tmp_path / "none")


def test_a_straight_line_is_told_from_a_random_walk(tmp_path):
    base, directions = random_weights(), rank_one_directions()
    still = "model.layers.0.input_layernorm.weight"
    directions[still] = torch.zeros_like(directions[still])
    line = record(tmp_path, base, {step: moved(base, directions, 0.5 * step) for step in (2, 4, 6, 8)})
    found = diagnose(line)
    assert isinstance(found, Diagnosis)
    assert found.steps == [2, 4, 6, 8]
    assert [row["tensor"] for row in found.tensors] == line.names
    by_name = {row["tensor"]: row for row in found.tensors}
    assert by_name[still]["explained_variance"] is None
    for name in set(base) - {still}:
        assert by_name[name]["explained_variance"] == pytest.approx(1.0, abs=1e-6)
        assert by_name[name]["line_r2"] == pytest.approx(1.0, abs=1e-6)
        assert by_name[name]["delta_norm"] == pytest.approx(4.0, rel=1e-4)
        assert by_name[name]["shape"] == list(base[name].shape)
    assert found.summary["line_r2"]["min"] == pytest.approx(1.0, abs=1e-6)
    # four increments of equal size that are orthogonal to each other
    walk = torch.linalg.eigvalsh(torch.tensor([[min(i, j) for j in range(1, 5)] for i in range(1, 5)]).double())
    assert found.random_walk["explained_variance"] == pytest.approx((walk[-1] / walk.sum()).item())
    assert diagnose(tmp_path / "trajectory", t_cut=6, fit_from=4).steps == [4, 6]
    assert face.diagnose is relex_verl.diagnose
