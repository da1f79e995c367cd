"""The destination: whole or not at all, and never in the place of what somebody else wrote."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from written import EMBEDDING, base, content, new_values, write_whole

from relex_verl.trajectory.checkpoint_writer import CheckpointWriter
from relex_verl.trajectory.files import write_json
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.shards import Placement, TensorShard

__all__ = ["base"]


def test_a_crash_before_commit_leaves_no_destination_and_the_next_attempt_works(base, tmp_path):
    folder, values = tmp_path / "runs" / "out", new_values(base)
    crashed = CheckpointWriter(base, folder, set(values), {})
    crashed.begin()
    crashed.write(TensorShard(EMBEDDING, (50, 16), Placement((0,), (3,)), torch.ones(3, dtype=torch.bfloat16)))
    (crashed.partial / "left over").write_text("")
    assert not folder.exists()
    with pytest.raises(FileExistsError, match="is being written by another command"):
        write_whole(base, folder, values)
    del crashed  # its process
    write_whole(base, folder, values)
    assert content(folder) == content(write_whole(base, tmp_path / "other", values))
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", ["begin", "write", "fsync", "provenance"])
def test_a_failure_leaves_the_old_destination_intact(base, tmp_path, monkeypatch, failing):
    old = {"method": "relex"}
    folder, values = write_whole(base, tmp_path / "out", new_values(base, 1), provenance=old), new_values(base, 2)
    before = content(folder)
    rename = os.replace
    if failing == "begin":
        monkeypatch.setattr("shutil.copyfile", out_of_space)
    elif failing == "write":
        monkeypatch.setattr(os, "pwrite", out_of_space)
    elif failing == "fsync":
        monkeypatch.setattr(os, "fsync", out_of_space)
    else:
        monkeypatch.setattr(
            os, "replace", lambda a, b: out_of_space() if Path(b).name == "relex.json" else rename(a, b)
        )
    with pytest.raises(OSError, match="no space"):
        write_whole(base, folder, values, provenance={"method": "relex"})
    monkeypatch.undo()
    assert content(folder) == before


def out_of_space(*args, **kwargs):
    raise OSError("no space left")


def test_commit_replaces_the_old_destination_as_a_whole(base, tmp_path):
    folder = write_whole(base, tmp_path / "out", new_values(base, 1), provenance={"method": "relex"})
    (folder / "stale.txt").write_text("of the old one")
    values = new_values(base, 2)
    write_whole(base, folder, values)
    assert content(folder) == content(write_whole(base, tmp_path / "other", values))


def work_of_others(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("ten years")


def run_that_a_prediction_stands_in(folder):
    (folder / "trajectory").mkdir(parents=True)
    (folder / "trajectory/index.json").write_text("{}")
    (folder / "relex.json").write_text("{}")


@pytest.mark.parametrize(
    ("occupy", "says"),
    [
        (work_of_others, "no checkpoint that relex-verl wrote"),
        (run_that_a_prediction_stands_in, "no checkpoint that relex-verl wrote"),
        (lambda folder: folder.write_text("a file"), "is a file"),
    ],
)
def test_what_we_did_not_write_is_never_replaced(base, tmp_path, occupy, says):
    folder = tmp_path / "out"
    occupy(folder)
    before = {path: path.read_bytes() for path in [folder, *folder.rglob("*")] if path.is_file()}
    with pytest.raises(FileExistsError, match=says):
        write_whole(base, folder, new_values(base))
    assert {path: path.read_bytes() for path in [folder, *folder.rglob("*")] if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_base_is_never_replaced_nor_a_folder_around_it(base, tmp_path):
    """Not even a base that is itself a checkpoint of ours, under another name."""
    home = tmp_path / "home"
    model = BaseCheckpoint(write_whole(base, home / "model", new_values(base), provenance={"method": "relex"}))
    before = content(model.folder)
    (tmp_path / "link").symlink_to(model.folder)
    for folder in (model.folder, tmp_path / "link", home / "model" / ".." / "model"):
        with pytest.raises(FileExistsError, match="is the base model itself"):
            write_whole(model, folder, new_values(base, 2))
    with pytest.raises(FileExistsError, match="no checkpoint that relex-verl wrote"):
        write_whole(model, home, new_values(base, 2))
    assert content(model.folder) == before


def test_an_empty_folder_is_filled_even_the_one_where_the_user_stands(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = new_values(base)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert write_whole(base, Path("."), values) == tmp_path / "here"
    assert content(tmp_path / "here") == content(write_whole(base, tmp_path / "other", values))


def test_no_space_names_the_place(base, tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/.out.partial/"):
        write_whole(base, tmp_path / "out", new_values(base))


def test_provenance_stands_beside_the_weights(base, tmp_path):
    writer = CheckpointWriter(base, tmp_path / "out", set(), {})
    writer.begin()
    assert writer.commit({"method": "relex", "target": 500}) == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "relex.json").read_text()) == {"method": "relex", "target": 500}


def test_json_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    monkeypatch.setattr(Path, "write_text", lambda self, text: self.write_bytes(text[:3].encode()) and out_of_space())
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
