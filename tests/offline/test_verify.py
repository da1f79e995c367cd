"""Damage of every kind is found, named, and bounded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import SHAPES, moved, random_weights, rank_one_directions, record
from safetensors.torch import load_file, save_file
from shell import call, json_of

BASE, ALONG = random_weights(), rank_one_directions()
STATES = {step: moved(BASE, ALONG, 0.01 * step) for step in (1, 2, 3, 4)}
ROW = "window_000/rank_00000/step_000003.safetensors"
PLACES = "window_000/rank_00000/placements.json"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    record(folder, BASE, STATES)
    return folder


@pytest.fixture
def copied(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded / "trajectory", tmp_path / "trajectory"))


def test_a_whole_one(copied: Path) -> None:
    found = json_of("verify", copied)
    assert found == {"files": 6, "damaged": {}, "unchecked": [], "unexplained": [], "whole_until": {"0": 4}}
    assert "trajectory: whole up to step 4" in call("verify", copied).stdout


def flipped(folder: Path) -> None:
    content = bytearray((folder / ROW).read_bytes())
    content[-3] ^= 16
    (folder / ROW).write_bytes(content)


def cut_short(folder: Path) -> None:
    (folder / ROW).write_bytes((folder / ROW).read_bytes()[:-8])


def gone(folder: Path) -> None:
    (folder / ROW).unlink()


def not_finite(folder: Path) -> None:
    arrays = load_file(folder / ROW)
    save_file({**arrays, "gram_row": arrays["gram_row"] * float("inf")}, folder / ROW)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(flipped, "checksum"), (cut_short, "incomplete"), (gone, "is missing"), (not_finite, "not finite")],
)
def test_a_step_is_named_and_the_ones_before_are_whole(copied: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copied)
    done = call("verify", copied, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1
    assert list(found["damaged"]) == [str(copied / ROW)]
    assert said in found["damaged"][str(copied / ROW)].lower()
    assert found["whole_until"] == {"0": 2}


def test_placements_that_are_damaged_leave_nothing_can_be_used(copied: Path) -> None:
    name = next(iter(SHAPES))
    places = json.loads((copied / PLACES).read_text())
    places[name]["length"] = [places[name]["length"][0] - 1]
    (copied / PLACES).write_text(json.dumps(places))
    assert f"{name} in window 0: the ranks hold 71 elements of its 72" in call("verify", copied).stdout
    (copied / PLACES).write_text("{")
    done = call("verify", copied)
    assert done.exit_code == 1
    assert "trajectory: cannot be used" in done.stdout


def test_another_base_is_found(recorded: Path, copied: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded / "base", tmp_path / "base")
    assert call("verify", copied, "--base", tmp_path / "base").exit_code == 0
    save_file({name: tensor + 1 for name, tensor in BASE.items()}, tmp_path / "base/model.safetensors")
    done = call("verify", copied, "--base", tmp_path / "base")
    assert done.exit_code == 1
    assert "damaged: the base model: " in done.stdout


def test_what_nobody_counts_and_what_has_no_checksum_is_said(copied: Path) -> None:
    (copied / "window_000/rank_00000/step_000009.safetensors").write_bytes(b"")
    save_file(load_file(copied / ROW), copied / ROW)
    found = json_of("verify", copied)
    assert found["unexplained"] == ["window_000/rank_00000/step_000009.safetensors"]
    assert found["unchecked"] == [str(copied / ROW)]


def test_without_an_index_there_is_nothing_to_say(tmp_path: Path) -> None:
    done = call("verify", tmp_path)
    assert done.exit_code == 1
    assert "no index.json" in done.stderr
