"""Trajectories on disk: each window apart, with its own origin; what version 0.1.0 wrote is read, and gone on with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from recorded import random_weights, record, record_cut_up
from safetensors.torch import load_file

from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate, write_checkpoint
from relex_verl.trajectory import replay
from relex_verl.trajectory.encodings import PackedStep
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard, whole
from relex_verl.trajectory.store import Trajectory

GOLDEN = Path(__file__).parents[1] / "golden" / "schema_1"
KEPT = ["bf16", "fp32-int8", "fp32-none_stored-origin", "sketch-4"]
BASE = random_weights(scale=0.1)
STATES = {step: random_weights(seed=step, scale=0.1) for step in (1, 2, 5)}


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy; the index names its base as it was called from that folder."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


@pytest.mark.parametrize("name", KEPT)
def test_what_0_1_0_wrote_gives_the_same_gram_and_predictions(golden: Path, name: str) -> None:
    trajectory, expected = Trajectory(golden / name / "trajectory"), load_file(golden / name / "expected.safetensors")
    assert trajectory.index.schema_version == 1
    assert (trajectory.steps, trajectory.record.origin_step) == ([1, 2, 3, 4, 5, 6], 0)
    torch.testing.assert_close(replay.window(trajectory).gram_LTT, expected["gram"], rtol=1e-9, atol=1e-18)
    for prediction in (Prediction("relex", 40), Prediction("raw-ols", 12)):
        for shard in extrapolate(trajectory, 6, prediction):
            wanted = expected[f"{prediction.folder_name}/{shard.name}"]
            for local, full, length in shard.placement.runs():
                assert torch.equal(shard.data[local : local + length], wanted[full : full + length])


@pytest.mark.parametrize("name", KEPT[:3])
def test_what_0_1_0_wrote_is_checked_out(golden: Path, name: str, tmp_path: Path) -> None:
    trajectory = Trajectory(golden / name / "trajectory")
    write_checkpoint(trajectory, replay.states(trajectory, 4), tmp_path / "step_4", dtype=trajectory.kind.dtype)
    given, base = load_file(tmp_path / "step_4" / "model.safetensors"), load_file(golden / "base" / "model.safetensors")
    assert {key: tensor.shape for key, tensor in given.items()} == {key: one.shape for key, one in base.items()}
    for key, tensor in given.items():  # by the formula that made the run
        place = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        slope = ((place * 37 + 11 * list(base).index(key)) % 17 - 8) / 2**13
        wiggle = ((place * 13 + 7 * 4) % 5 - 2) / 2**16
        true = base[key].double() + (0 if "norm" in key else 1) * (4 * slope + wiggle)
        bound = replay.error_bound(trajectory, 4)
        wanted = true.float().to(trajectory.kind.dtype).double()
        assert float((tensor.double() - wanted).abs().max()) <= bound + 1e-6


def test_a_run_of_0_1_0_is_gone_on_with_in_its_own_layout(golden: Path) -> None:
    """Resumed after step 4: its files stay where they are, and 0.1.0 would still read them."""
    folder = golden / "sketch-4" / "trajectory"  # of one rank
    observer = Observer(folder, "base", {}, {"project": "p", "experiment": "e"}, KINDS["sketch-4"])
    base = load_file(golden / "base" / "model.safetensors")

    def source(shift: float) -> list[TensorShard]:
        return [TensorShard(n, tuple(t.shape), whole(t.shape), t.float().flatten() + shift) for n, t in base.items()]

    observer.start(source(0.0))
    observer.open(6)
    assert observer.steps == [1, 2, 3, 4, 5, 6]
    observer.observe(7, source(0.001))
    observer.save()
    index = json.loads((folder / "index.json").read_text())
    assert index["schema_version"] == 1
    assert set(index["windows"][0]) == {"origin_step", "origin", "steps", "stored"}
    assert (folder / "rank_00000" / "step_000007.safetensors").exists()
    assert not list(folder.glob("window_*"))
    assert Trajectory(folder).steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["bf16", "fp32-none"])
def test_windows_have_files_and_an_origin_of_their_own(tmp_path: Path, kind: str) -> None:
    """The second begins at step 5 from weights that no step of the first had."""
    first = record_cut_up(tmp_path, BASE, STATES, kind)
    jumped, later = random_weights(seed=50, scale=0.1), {step: random_weights(seed=step, scale=0.1) for step in (6, 8)}
    second, codec = first.begin_window(5), KINDS[kind].rows
    assert codec is not None
    for rank in range(2):
        placements = first.placements(rank)

        def part(weights: dict, name: str, placements: dict = placements) -> torch.Tensor:
            flat = weights[name].flatten().to(KINDS[kind].dtype)
            return torch.cat([flat[start : start + length] for _, start, length in placements[name].runs()])

        held = {name: part(jumped, name) for name in placements}
        second.declare_rank(rank, placements, torch.cat(list(held.values())))
        for t, (step, weights) in enumerate(later.items()):
            increments = [codec.encode(held[name], part(weights, name)) for name in placements]
            for name, increment in zip(placements, increments, strict=True):
                codec.advance(held[name], increment)
            row = torch.zeros(len(placements), t + 1, dtype=torch.float64)
            second.append(rank, step, PackedStep.pack(KINDS[kind].part, increments, row))
    for step in later:
        second.commit(step)
    second.write_index()

    opened = Trajectory(first.folder)
    assert (opened.steps, opened.record.origin_step) == ([6, 8], 5)
    assert replay.window(opened).origin_step == 5
    assert opened.of_window(0).steps == [1, 2, 5]
    assert Trajectory(first.folder, window=0).steps == [1, 2, 5]
    for trajectory, weights in ((opened, {5: jumped, **later}), (opened.of_window(0), {0: BASE, **STATES})):
        for step, expected in weights.items():
            for shard in replay.states(trajectory, step):
                flat = expected[shard.name].flatten().to(shard.data.dtype)
                for local, full, length in shard.placement.runs():
                    assert torch.allclose(shard.data[local : local + length], flat[full : full + length], atol=1e-6)
    ranks = {path.parent.name for path in first.folder.rglob("rank_*")}
    assert ranks == {"window_000", "window_001"}
    with pytest.raises(TrajectoryError, match="a window cannot begin at step 7"):
        opened.begin_window(7)
    with pytest.raises(TrajectoryError, match="has 2 windows, numbered from 0: there is no window 2"):
        Trajectory(first.folder, window=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema_version": 5}, "schema version 5, this relex-verl reads 1 to 4"),
        ({"schema_version": None}, "schema version None"),
        ({"encoding": "fp64"}, "encoding 'fp64'"),
        ({"windows": []}, "0 windows"),
        ({"windows": [{"folder": "../../etc"}]}, "a window's folder cannot be '../../etc'"),
        ({"windows": [{"unheard": 1}]}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"encoding": []}, r"encoding \[\]"),
        ({"given_up": 5}, "given_up has to be a list of steps"),
        ({"given_up": ["5"]}, "given_up has to be a list of steps"),
    ],
)
def test_an_index_that_is_not_understood_is_refused_by_name(tmp_path: Path, change: dict, says: str) -> None:
    folder = record(tmp_path, BASE, STATES).folder
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(TrajectoryError, match=says):
        Trajectory(folder)


JUMP = {"method": "relex", "target": 20, "rank": 1, "fit_from": 1, "optimizer": "keep"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"jump": None, "undone": True}, None),
        ({"jump": None}, None),
        ({"folder": "."}, r"folder cannot be '\.'"),
        ({"folder": "window_000"}, "folder cannot be 'window_000'"),
        ({"folder": "window_001/../.."}, "folder cannot be"),
        ({"folder": ["window_001"]}, "window 1: "),
        ({"origin": "/etc/passwd"}, "the origin of window_001 cannot be '/etc/passwd'"),
        ({"origin_step": 4}, "a window cannot begin at step 4: the one before it goes up to step 5"),
        ({"origin_step": True}, "do not ascend from its origin at True"),
        ({"steps": [6, 6]}, "the steps of window_001 do not ascend"),
        ({"steps": [5]}, "the steps of window_001 do not ascend"),
        ({"steps": [6, 7.5]}, "the steps of window_001 do not ascend"),
        ({"steps": {}}, "the steps of window_001 do not ascend"),
        ({"steps": None}, "window 1: "),
        ({"stored": [8]}, "stored steps that are not among its steps"),
        ({"stored": [[]]}, "window 1: "),
        ({"undone": True}, "begins with a jump, with the undoing of one, or with neither"),
        ({"undone": 1}, "begins with a jump, with the undoing of one, or with neither"),
        ({"jump": []}, "a jump has to say method, target, rank, fit_from, optimizer"),
        ({"jump": {**JUMP, "more": 1}}, "a jump has to say"),
        ({"jump": {key: JUMP[key] for key in ("method", "target")}}, "a jump has to say"),
        ({"jump": {**JUMP, "method": "[red]relax"}}, "cannot have method"),
        ({"jump": {**JUMP, "method": {}}}, "window 1: "),
        ({"jump": {**JUMP, "optimizer": "lose"}}, "cannot have method 'relex' and optimizer 'lose'"),
        ({"jump": {**JUMP, "target": 5}}, "a jump at step 5 cannot have target 5"),
        ({"jump": {**JUMP, "target": "20"}}, "a jump at step 5 cannot have target '20'"),
        ({"jump": {**JUMP, "rank": 0}}, "a jump at step 5 cannot have target 20, rank 0"),
        ({"jump": {**JUMP, "fit_from": -1}}, "a jump at step 5 cannot have target 20, rank 1, fit_from -1"),
    ],
)
def test_a_second_window_that_no_run_writes_is_refused_by_name(tmp_path: Path, change: dict, says: str | None) -> None:
    folder = record(tmp_path, BASE, STATES).folder
    content = json.loads((folder / "index.json").read_text())
    second = {"origin_step": 5, "origin": "stored", "steps": [6], "stored": [], "folder": "window_001", "jump": JUMP}
    content["windows"].append({**second, **change})
    (folder / "index.json").write_text(json.dumps(content))
    if says is None:
        assert Trajectory(folder).record.jump == {**second, **change}["jump"]
        return
    with pytest.raises(TrajectoryError, match=f"index.json is damaged: .*{says}"):
        Trajectory(folder)


@pytest.mark.parametrize("change", [{"jump": JUMP}, {"undone": True}])
def test_a_first_window_begins_without_a_jump(tmp_path: Path, change: dict) -> None:
    folder = record(tmp_path, BASE, STATES).folder
    content = json.loads((folder / "index.json").read_text())
    assert not {"jump", "undone", "given_up"} & {*content, *content["windows"][0]}  # as it was before there were any
    content["windows"][0] |= change
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(TrajectoryError, match="is the first, and can begin neither with a jump nor with the undoing"):
        Trajectory(folder)


def test_a_run_of_0_1_0_may_jump(golden: Path) -> None:
    """Its first window stays where it is; 0.1.0, which knows one window, does not read it any more."""
    folder = golden / "sketch-4" / "trajectory"
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    observer = Observer(folder, "base", {}, {"project": "p", "experiment": "e"}, KINDS["sketch-4"])
    base = load_file(golden / "base" / "model.safetensors")
    source = [TensorShard(n, tuple(t.shape), whole(t.shape), t.float().flatten() + 0.5) for n, t in base.items()]
    observer.start([TensorShard(s.name, s.shape, s.placement, s.data - 0.5) for s in source])
    observer.open(6)
    observer.begin_window(6, source, {**JUMP, "target": 40})
    first, second = Trajectory(folder, window=0), Trajectory(folder)
    assert (first.steps, first.record.folder, second.index.schema_version) == ([1, 2, 3, 4, 5, 6], ".", 2)
    assert {path: path.read_bytes() for path in before} == before
    for shard, wanted in zip(replay.origins(second), source, strict=True):
        assert torch.equal(shard.data, wanted.data)
