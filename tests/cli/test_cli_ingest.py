"""`relex-verl ingest` as a command: from folders and from a Hub, and once more."""

import json

import pytest
from shell import call, finished, json_of, refused
from stand_in_hub import serving

from relex_verl.cli import ingest

__all__ = ["finished"]


def test_once_more_adds_nothing(finished):
    again = ("ingest", "--base", finished / "base", "--checkpoints", finished / "run", "--out", finished / "whole")
    assert "(0 added)" in call(*again).stdout
    assert json_of(*again)["added"] == []


def test_the_bar_counts_what_is_still_to_do(finished, tmp_path, monkeypatch):
    totals, bar = [], ingest.step_bar

    def recorded(title, total):
        totals.append(total)
        return bar(title, total)

    monkeypatch.setattr(ingest, "step_bar", recorded)
    there = ("ingest", "--base", finished / "base", "--checkpoints", finished / "run", "--out", tmp_path / "t")
    call(*there, "--steps", "1-3")
    call(*there)
    assert totals == [3, 3]


def test_from_a_hub(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(finished / "run") as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        there = ("ingest", "--base", finished / "base", "--hub", "some/run", "--out", tmp_path / "t")
        found = json_of(*there, "--revisions", "step_{N}", "--steps", "1-4")
        assert "no revision named like" in refused(*there, "--revisions", "iter_{N}")
        compared = json_of("compare", tmp_path / "t", "--t-cut", 4, "--hub", "some/run", "--steps", "6")
    assert found["steps"] == [1, 2, 3, 4]
    index = json.loads((tmp_path / "t/index.json").read_text())
    assert index["run"] == {"ingested_from": "hub:some/run"}
    assert {row["step"] for row in compared["rows"] if row["method"] == "relex"} == {6}
    same_run = json_of("compare", finished / "whole", "--t-cut", 4, "--steps", "6")
    rows = [next(row for row in one["rows"] if row["method"] == "relex") for one in (compared, same_run)]
    assert rows[0]["cosine"] == pytest.approx(rows[1]["cosine"], rel=1e-6)
