"""A run that resumes with other ranks: 2 to 1, 1 to 4, 4 to 2, and with FSDP1's cut for FSDP2's, in one chain."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fakes import DriftingModel, RankSource
from pipeline import PREDICTION, RUN, on_ranks, weights_of
from safetensors.torch import load_file

from relex_verl.offline.verify import verify
from relex_verl.pipeline.collectives import Collectives
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import extrapolate, write_checkpoint
from relex_verl.trajectory import replay
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.index import TrajectoryError
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.recut import overlaps
from relex_verl.trajectory.shards import Placement, TensorShard, placement_of_positions
from relex_verl.trajectory.store import Trajectory
from relex_verl.trajectory.windows import next_folder


class FlatSource:
    """FSDP1: all tensors end to end, a stretch of them for each rank, wherever tensors and groups of 64 begin."""

    def __init__(self, weights: dict[str, torch.Tensor], rank: int, world: int) -> None:
        self.weights, total = weights, sum(tensor.numel() for tensor in weights.values())
        self.first, self.last = rank * total // world + rank, (rank + 1) * total // world + rank + 1
        self.last = total if rank == world - 1 else self.last

    def __iter__(self) -> Iterator[TensorShard]:
        begin = 0
        for name, tensor in self.weights.items():
            start, stop = max(self.first - begin, 0), min(self.last - begin, tensor.numel())
            begin += tensor.numel()
            if stop > start:
                where = Placement((start,), (stop - start,))
                yield TensorShard(name, tuple(tensor.shape), where, tensor.flatten()[start:stop])


# Ranks, how they cut, the step that they resume from, and those that they observe.
CHAIN = [
    (2, RankSource, 0, (1, 2, 4)),
    (1, RankSource, 4, (5, 6)),
    (4, FlatSource, 6, (7, 9)),
    (2, FlatSource, 7, (8,)),  # step 9 of before does not count any more
    (2, RankSource, 8, (10,)),
]
STEPS = [1, 2, 4, 5, 6, 7, 8, 10]
KINDS_HERE = ("bf16", "fp32-int8", "sketch-4")
GOLDEN = Path(__file__).parents[1] / "golden" / "schema_1"


def observer_of(folder: Path, base: Path, kind: str, ranks: Collectives, source: RankSource | FlatSource) -> Observer:
    observer = Observer(folder, str(base), {}, RUN, KINDS[kind], ranks)
    observer.start(source)
    return observer


def go_on(folder: Path, base: Path, kind: str, link: tuple, ranks: Collectives, windows: bool) -> Observer:
    world, cut, resumed, steps = link
    model = DriftingModel(weights_of(base))
    observer = observer_of(folder, base, kind, ranks, cut(model.at(0), ranks.rank, world))
    observer.open(resumed)
    for step in steps:
        observer.observe(step, cut(model.at(step), ranks.rank, world))
        observer.save()  # a sketch, with the host's checkpoint
        if windows and step == 2:
            observer.begin_window(step, cut(model.at(step), ranks.rank, world))
    return observer


def chain(rank: int, world: int, base: Path, out: Path) -> None:
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}
    for name in (*KINDS_HERE, "windows"):
        kind = "bf16" if name == "windows" else name
        for i, link in enumerate(CHAIN):
            if rank < link[0]:
                go_on(out / name, base, kind, link, Collectives(groups[link[0]]), name == "windows")
            dist.barrier()
            if rank == 0 and i == 1:  # what a re-cut that was killed has left
                folders = [record.folder for record in Trajectory(out / name).windows]
                shutil.copytree(out / name / folders[-1], out / name / next_folder(folders))
            dist.barrier()


def test_a_chain_of_other_ranks(base: Path, tmp_path: Path) -> None:
    on_ranks(4, chain, base, tmp_path)
    for kind in KINDS_HERE:
        check_like_uncut(Trajectory(tmp_path / kind), base, kind, tmp_path)
    jumped = Trajectory(tmp_path / "windows")
    assert [record.steps for record in jumped.windows] == [[1, 2], STEPS[2:]]
    model = DriftingModel(weights_of(base))
    for step in STEPS[2:]:
        for shard in replay.states(jumped, step):
            expected = shard.placement.cut_out_of(model.at(step)[shard.name]).bfloat16()
            assert torch.equal(shard.data, expected)
    assert verify(jumped.folder).damaged == {}
    refused_where_a_ranks_files_are_gone(base, tmp_path / "bf16")


def check_like_uncut(there: Trajectory, base: Path, kind: str, out: Path) -> None:
    """G, the observed weights and a prediction are those of one rank that was never cut anew."""
    go_on(out / f"{kind}-uncut", base, kind, (1, RankSource, 0, STEPS), Collectives(), windows=False)
    uncut = Trajectory(out / f"{kind}-uncut")
    found = verify(there.folder)
    assert (found.damaged, found.unexplained) == ({}, [])
    assert (there.steps, there.index.world_size) == (STEPS, 2)
    codes = kind == "fp32-int8"
    ours, theirs = replay.window(there).gram_LTT, replay.window(uncut).gram_LTT
    largest = theirs.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-300)
    assert float(((ours - theirs) / largest).abs().max()) < {"bf16": 1e-11, "sketch-4": 1e-5, "fp32-int8": 2e-3}[kind]
    assert there.index.requantized == (4 if codes else 0)
    model = DriftingModel(weights_of(base))
    for step in STEPS if there.kind.keeps_rows else ():
        bound = replay.error_bound(there, step)
        for shard in replay.states(there, step):
            expected = shard.placement.cut_out_of(model.at(step)[shard.name]).to(shard.data.dtype)
            off = float((shard.data.float() - expected.float()).abs().max())
            assert off <= bound, (kind, step, shard.name)
    folders = [
        write_checkpoint(one, extrapolate(one, 10, PREDICTION), out / name / kind)
        for one, name in ((there, "ours"), (uncut, "theirs"))
    ]
    one, other = map(BaseCheckpoint, folders)
    same = [(one.read(name) == other.read(name)).float().mean() for name in one.entries]
    assert min(same) == 1 if kind == "bf16" else min(same) > (0.99 if not codes else 0.9)


def refused_where_a_ranks_files_are_gone(base: Path, folder: Path) -> None:
    lost = Trajectory(folder).rank_folder(1)
    shutil.rmtree(lost)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    observer = observer_of(folder, base, "bf16", Collectives(), RankSource(DriftingModel(weights_of(base)).at(0)))
    with pytest.raises(TrajectoryError, match=f"{lost}, which rank 1 of 2 wrote, is missing.*own relex.output_dir"):
        observer.open(10)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["bf16", "fp32-none_stored-origin"])
def test_what_two_ranks_of_0_1_0_wrote_is_gone_on_with_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    folder, expected = Path(name) / "trajectory", load_file(Path(name) / "expected.safetensors")
    weights = load_file("base/model.safetensors")
    observer = observer_of(folder, Path("base"), Trajectory(folder).kind.name, Collectives(), RankSource(weights))
    observer.open(6)
    trajectory = Trajectory(folder)
    assert (trajectory.index.schema_version, trajectory.index.world_size, observer.steps) == (2, 1, [1, 2, 3, 4, 5, 6])
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "window_001"]
    torch.testing.assert_close(observer.window().gram_LTT, expected["gram"], rtol=1e-9, atol=1e-18)
    for shard in extrapolate(trajectory, 6, PREDICTION):
        assert torch.equal(shard.data, expected[f"{PREDICTION.folder_name}/{shard.name}"].flatten())


def test_what_two_shards_share() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        one, other = (
            placement_of_positions(
                torch.randperm(40, generator=generator)[: int(torch.randint(1, 40, (), generator=generator))]
            )
            for _ in range(2)
        )
        full = torch.randn(40, generator=generator)
        ours, theirs = one.cut_out_of(full), other.cut_out_of(full)
        found = overlaps(one, other)
        assert sum(length for _, _, length in found) == len(set(ours.tolist()) & set(theirs.tolist()))
        assert all(torch.equal(ours[i : i + n], theirs[j : j + n]) for i, j, n in found)
