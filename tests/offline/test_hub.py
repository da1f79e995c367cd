"""A predicted checkpoint on the Hub: what is uploaded, and a card that is true of it."""

import json
from math import nan
from types import SimpleNamespace

import pytest
from cut_reports import cut_report, scored
from shell import call, finished

from relex_verl.maths.extrapolators import METHODS
from relex_verl.offline import hub as sharing
from relex_verl.offline.baselines import SOURCES

__all__ = ["finished"]

FACTS = {"base_model": "Qwen/Qwen3-4B-Base", "method": "relex", "rank": 1, "t_cut": 75, "target": 500}
FACTS |= {"observed_steps": [1, 2, 3], "trajectory": "/home/me/run/relex/trajectory", "versions": {"torch": "2"}}


class StandInApi:
    """In place of huggingface_hub.HfApi: remembers what would be uploaded."""

    def __init__(self):
        self.repos, self.folders, self.files = [], [], {}

    def create_repo(self, repo, **options):
        self.repos.append((repo, options["private"]))
        return f"https://hub.test/{repo}"

    def upload_folder(self, **options):
        self.folders.append((options["folder_path"], options["ignore_patterns"]))

    def upload_file(self, **options):
        self.files[options["path_in_repo"]] = options["path_or_fileobj"].decode()

    def model_info(self, name):
        return SimpleNamespace(card_data=SimpleNamespace(license="apache-2.0"))


def checkpoint(folder, **facts):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "relex.json").write_text(json.dumps({**FACTS, **facts}))
    return folder


def write(folder, text):
    (folder / "relex.json").write_text(text)


def card(folder):
    api = StandInApi()
    sharing.push(folder, "me/model", api=api)
    return api.files["README.md"]


def test_an_adapter_is_loaded_with_peft(tmp_path):
    folder = checkpoint(tmp_path / "relex-step_500")
    assert "library_name: transformers" in card(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "library_name: peft" in card(folder)


def test_push_uploads_with_a_card_and_without_this_machines_paths(finished, tmp_path, monkeypatch):
    out = tmp_path / "relex/predicted"
    call("extrapolate", finished / "trajectory", "--t-cut", 4, "--target", 8, "--out", out)
    api = StandInApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    assert "https://hub.test/me/model" in call("push", out / "relex-step_8", "me/model", "--private").stdout
    assert api.repos == [("me/model", True)]
    assert api.folders == [(str(out / "relex-step_8"), ["README.md", "relex.json"])]
    for said in ("license: apache-2.0", "step 8", "1-4", "Nobody scored it", "relex, rank 1", "Algorithm 2"):
        assert said in api.files["README.md"], api.files["README.md"]
    uploaded = json.loads(api.files["relex.json"])
    assert uploaded["base_model"] == "base"
    assert uploaded["trajectory"] == "trajectory"
    assert str(finished) not in "".join(api.files.values())
    assert uploaded.keys() == json.loads((out / "relex-step_8/relex.json").read_text()).keys()


def report(path, t_cut, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cut_report(t_cut, validation_scores=list(rows)).to_json()))


HELD = scored("observed-step_75", 75, 0.7, None)
WON = scored("relex-step_500", 500, 0.71)
OTHER = scored("relex-step_750", 750, 0.69)


@pytest.mark.parametrize("place", ["predicted/relex-step_500", "recommended"])
@pytest.mark.parametrize("where", ["report.json", "scores/cut_75/report.json"])
def test_its_scores_stand_beside_those_of_its_cut(tmp_path, place, where):
    folder = checkpoint(tmp_path / place)
    report(tmp_path / "report.json", 150, scored("relex-step_500", 500, 0.1))  # of a later cut
    report(tmp_path / where, 75, HELD, WON, OTHER)
    written = card(folder)
    assert "# relex-step_500" in written
    for said in ("| observed-step_75 | 0.7 |", "| relex-step_500 | 0.71 |", "| relex-step_750 | 0.69 |"):
        assert said in written
    assert "Nobody scored it" not in written


@pytest.mark.parametrize(
    ("t_cut", "rows"),
    [
        (75, [HELD, OTHER]),
        (150, [HELD, WON]),
        (75, [HELD, scored("poly-step_500", 500, 0.6, "poly")]),
        (75, [HELD, scored("relex-step_500", 500, nan)]),
        (75, []),
    ],
    ids=["another target", "another cut", "another method", "not finished", "nothing scored"],
)
def test_a_prediction_that_was_not_scored_keeps_its_warning(tmp_path, t_cut, rows):
    report(tmp_path / "report.json", t_cut, *rows)
    written = card(checkpoint(tmp_path / "predicted/relex-step_500"))
    assert "Nobody scored it" in written
    assert "0.7" not in written


@pytest.mark.parametrize("content", ["{", "{}", '{"schema_version": 9}'])
def test_a_report_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    assert "Nobody scored it" in card(checkpoint(tmp_path / "predicted/relex-step_500"))


@pytest.mark.parametrize("method", [*METHODS, *SOURCES, "reconstruction"])
def test_a_card_names_the_method_and_whose_it_is(tmp_path, method):
    written = card(checkpoint(tmp_path / "out", method=method))
    assert f"by `{method}` (" in written
    source = METHODS[method].source if method in METHODS else SOURCES.get(method, "Algorithm 1")
    assert source.split(", arXiv")[0] in written
    if "arXiv" in source:
        number = source.split("arXiv:")[1]
        assert f"(https://arxiv.org/abs/{number})" in written
    if method != "relex":
        assert "RELEX](" not in written


def test_what_is_no_extrapolation_to_a_step_is_not_called_so(tmp_path):
    alpharl = card(checkpoint(tmp_path / "alpharl-score_0.5", method="alpharl", target=None, settings={"wanted": 0.5}))
    assert "to a score of 0.5" in alpharl
    assert "# alpharl-score_0.5" in alpharl
    rebuilt = card(checkpoint(tmp_path / "rebuilt", method="reconstruction", rank=2))
    assert "the rank-2 part of step 500 of a GRPO run, over its steps up to 75" in rebuilt


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "relex.json").unlink(), "has no relex.json"),
        (lambda folder: write(folder, "{"), "is damaged"),
        (
            lambda folder: (folder / "relex.json").write_text('{"base_model": "b", "step": 4}'),
            "lacks method: .* is no predicted checkpoint",
        ),
        (
            lambda folder: (folder / "relex.json").write_text('{"schema_version": 2}'),
            "has schema_version 2, .* reads up to 1",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors file"),
    ],
)
def test_what_cannot_be_shared(tmp_path, spoil, says):
    folder = checkpoint(tmp_path / "out")
    spoil(folder)
    with pytest.raises(sharing.ShareError, match=says):
        sharing.push(folder, "me/model", api=StandInApi())


def test_a_hub_that_refuses_is_one_line(tmp_path):
    class Refusing(StandInApi):
        def create_repo(self, repo, **options):
            raise OSError("403 Forbidden\nlong explanation")

    with pytest.raises(sharing.ShareError, match=r"me/model: 403 Forbidden \(log in") as caught:
        sharing.push(checkpoint(tmp_path / "out"), "me/model", api=Refusing())
    assert "\n" not in str(caught.value)
