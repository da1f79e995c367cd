"""Checkpoints that are no safetensors folders: pickled weights, verl's shards merged by verl, revisions of a Hub."""

import errno
import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import tiny_base
from finished import STEPS, read, run, write_run
from safetensors.torch import load_file
from shell import call
from stand_in_hub import serving
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from relex_verl.offline.ingest import Found, IngestError, Options, find_checkpoints, find_revisions, ingest
from relex_verl.offline.ingest import checkpoints as sources
from relex_verl.trajectory import replay
from relex_verl.trajectory.store import Trajectory

PICKLED = Options(allow_pickle=True)
needs_verl = pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed: it merges its shards")


@pytest.fixture
def finished(tmp_path):
    write_run(tmp_path)
    return tmp_path


def leftovers(root):
    return list(root.rglob(".relex-ingest-*"))


# ---------------------------------------------------------------- pickled


@pytest.fixture
def pickled(finished):
    """The same run as pytorch_model.bin files; its safetensors trajectory is `exact`."""
    run(finished, "exact")
    for step in STEPS:
        path = finished / "run" / f"global_step_{step}" / "model.safetensors"
        # Every second one as torch wrote them before 1.6.
        torch.save(load_file(path), path.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=step % 2 == 0)
        path.unlink()
    return finished


def test_pickle_is_refused_unless_allowed(pickled):
    with pytest.raises(IngestError, match=r"step 1 \(.*global_step_1\) is pickled.*--allow-pickle"):
        run(pickled)
    assert not (pickled / "trajectory").exists()
    loaded = run(pickled, options=PICKLED)
    assert torch.equal(replay.increment_gram(loaded), replay.increment_gram(Trajectory(pickled / "exact")))
    assert leftovers(pickled) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"bad": Path}, "cannot be loaded with weights_only=True"),
        ({"epoch": 3}, "epoch is no tensor but a int"),
        ([torch.ones(2)], "holds no named tensors but a list"),
        (b"not a pickle at all", "cannot be loaded with weights_only=True"),
    ],
    ids=["code", "number", "list", "damaged"],
)
@pytest.mark.parametrize("step", [1, 5])
def test_a_bad_pickle_names_its_step_and_place(pickled, content, says, step):
    path = pickled / f"run/global_step_{step}/pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(
        IngestError, match=rf"step {step} \(.*global_step_{step}\): pytorch_model.bin.* {says}"
    ) as caught:
        run(pickled, options=PICKLED)
    assert "\n" not in str(caught.value)
    assert ".relex-ingest-" not in str(caught.value)
    assert (pickled / "trajectory").exists() == (step == 5)
    assert leftovers(pickled) == []


def test_what_a_temporary_copy_holds_is_said_of_the_checkpoint(pickled):
    path = pickled / "run/global_step_5/pytorch_model.bin"
    state = torch.load(path)
    torch.save({name: tensor.float() for name, tensor in state.items()}, path)
    with pytest.raises(IngestError, match=r"step 5 \(.*global_step_5\): lm_head.weight is F32.*steps 1-2 are kept"):
        run(pickled, options=PICKLED)


def test_temporary_copies_lie_beside_the_trajectory_and_a_full_disk_is_named(pickled, monkeypatch):
    saved, places = sources.save_file, []

    def full(tensors, path, metadata):
        places.append(path.parent)
        if len(places) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path, metadata)

    monkeypatch.setattr(sources, "save_file", full)
    (pickled / "disk").mkdir()
    out = pickled / "disk" / "new" / "trajectory"
    with pytest.raises(IngestError, match=r"step 5 .*no space left for its temporary copy in .*/disk: .*1-2 are kept"):
        ingest(str(pickled / "base"), find_checkpoints(pickled / "run"), "run", out, PICKLED)
    assert [place.parent for place in places] == 3 * [pickled / "disk"]
    assert leftovers(pickled) == []


# ---------------------------------------------------------------- verl


def save_shards(rank, weights, folder, store):
    """What verl's FSDP2 checkpoint holds: DTensors cut by rows, float32, a file a rank."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        for step, state in weights.items():
            parts = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in state.items()}
            torch.save(parts, folder / f"global_step_{step}/actor/model_world_size_2_rank_{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run of which verl kept its own float32 shards of two ranks; `true` is what they hold."""
    root = tmp_path_factory.mktemp("sharded")
    base = tiny_base(root / "base", dtype=torch.float32)
    origin = read(base)
    true = {step: {name: tensor + 1e-4 * step for name, tensor in origin.items()} for step in (4, 8)}
    for step in true:
        actor = root / f"run/global_step_{step}/actor"
        shutil.copytree(base, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
        (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 2}))
    mp.spawn(save_shards, args=(true, root / "run", root / "store"), nprocs=2)
    return root, true


def copy_of(sharded, tmp_path):
    shutil.copytree(sharded[0] / "run", tmp_path / "run")
    shutil.copytree(sharded[0] / "base", tmp_path / "base")
    return tmp_path


@needs_verl
def test_verls_shards_through_verls_merger(sharded, tmp_path):
    root = copy_of(sharded, tmp_path)
    assert {one.kind for one in find_checkpoints(root / "run")} == {"verl"}
    with pytest.raises(IngestError, match="--allow-pickle"):
        run(root)
    there = ("--base", root / "base", "--checkpoints", root / "run", "--out", root / "trajectory")
    said = call("ingest", *there, "--allow-pickle")
    assert said.exit_code == 0, said.output
    assert "rounds the shards to bfloat16" in said.stderr
    trajectory = Trajectory(root / "trajectory")
    assert trajectory.index.encoding == "bf16"
    for step, true in sharded[1].items():
        for shard in replay.states(trajectory, step):
            assert torch.equal(shard.data, true[shard.name].flatten().bfloat16()), (step, shard.name)
    assert leftovers(root) == []


def cut_off(actor):
    path = actor / "model_world_size_2_rank_1.pt"
    path.write_bytes(path.read_bytes()[:-1000])


@needs_verl
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (cut_off, r"model_world_size_2_rank_1\.pt is truncated or damaged"),
        (lambda actor: (actor / "model_world_size_2_rank_0.pt").unlink(), r"shards of ranks \[0\] of 2 are missing"),
        (lambda actor: (actor / "fsdp_config.json").unlink(), r"verl's model merger failed: .*fsdp_config\.json"),
    ],
    ids=["truncated", "missing", "no fsdp_config"],
)
def test_shards_that_cannot_be_merged(sharded, tmp_path, spoil, says):
    root = copy_of(sharded, tmp_path)
    spoil(root / "run/global_step_4/actor")
    with pytest.raises(IngestError, match=rf"step 4 \(.*global_step_4/actor\): {says}") as caught:
        run(root, options=PICKLED)
    assert "\n" not in str(caught.value)
    assert not (root / "trajectory").exists()
    assert leftovers(root) == []


@needs_verl
def test_a_merger_without_space_names_the_place(sharded, tmp_path, monkeypatch):
    root = copy_of(sharded, tmp_path)
    full = subprocess.CompletedProcess([], 1, "", "Traceback\nOSError: [Errno 28] No space left on device\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: full)
    with pytest.raises(IngestError, match=f"step 4 .*no space left for its temporary copy in {root}"):
        run(root, options=PICKLED)


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def fetched():
    """Files that the Hub was asked for."""
    return []


@pytest.fixture
def hub(finished, fetched, monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    with serving(finished / "run", fetched) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield finished


def test_revisions_of_a_hub_repository(hub, fetched):
    """Each is downloaded once."""
    local = run(hub, "local")
    found = find_revisions("some/run", "step_{N}")
    assert [one.step for one in found] == list(STEPS)
    trajectory = ingest(str(hub / "base"), found, "hub:some/run", hub / "trajectory")
    assert torch.equal(replay.increment_gram(trajectory), replay.increment_gram(local))
    weights = [file for file in fetched if file.endswith(".safetensors")]
    assert weights == [f"global_step_{step}/model.safetensors" for step in STEPS]
    assert leftovers(hub) == []


@pytest.mark.parametrize("whole", [True, False])
def test_a_cached_revision_is_used_if_its_weights_are_there(hub, monkeypatch, whole):
    """Somebody who only looked at config.json has a snapshot folder, too."""
    cached = hub / "cached"
    shutil.copytree(hub / "run/global_step_1", cached)
    if not whole:
        (cached / "model.safetensors").unlink()
    fetched = []

    def snapshot(repo, **options):
        if options.get("local_files_only"):
            return str(cached)
        fetched.append(options["revision"])
        shutil.copytree(hub / "run/global_step_1", options["local_dir"], dirs_exist_ok=True)
        return str(options["local_dir"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with Found(1, "hub", "some/run@step_1").opened(workspace=hub) as folder:
        assert (folder == cached) == whole
        assert read(folder).keys() == read(hub / "base").keys()
    assert fetched == ([] if whole else ["step_1"])
    assert cached.exists()


def test_a_hub_that_has_no_such_revisions(hub, monkeypatch):
    with pytest.raises(IngestError, match="no revision named like iter_"):
        find_revisions("some/run", "iter_{N}")
    with pytest.raises(IngestError, match=r"write \{N\}"):
        find_revisions("some/run", "step")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(IngestError, match="--hub some/run"):
        find_revisions("some/run", "step_{N}")
    with (
        pytest.raises(IngestError, match=r"step 3 \(some/run@step_3\): "),
        Found(3, "hub", "some/run@step_3").opened(workspace=hub),
    ):
        pass
    assert leftovers(hub) == []
