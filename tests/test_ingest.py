"""Finished runs become trajectories: every layout and type that people have, and every way in which a folder can be bad."""

import errno
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource, tiny_base
from safetensors.torch import load_file, save_file

from relex_verl import ingest as ingesting
from relex_verl import replay
from relex_verl import trajectory as store
from relex_verl.hf_checkpoint import BaseCheckpoint
from relex_verl.ingest import IngestError, Options, find_checkpoints, find_revisions, ingest, select_steps
from relex_verl.observer import Observer
from relex_verl.prediction import Prediction, extrapolate, write_checkpoint
from relex_verl.trajectory import Trajectory

STEPS = (1, 2, 5, 9)
REAL_SHARDS = Path("/tmp/r2/checkpoints/global_step_4/actor")


def read(folder):
    checkpoint = BaseCheckpoint(folder)
    return {name: checkpoint.read(name).clone() for name in checkpoint.entries}


def write_run(root, steps=STEPS, dtype=torch.bfloat16, inside=".", **base):
    """A base and checkpoints of a run that started there."""
    start = tiny_base(root / "base", **base)
    model = DriftingModel(read(start))
    for step in steps:
        folder = root / "run" / f"global_step_{step}" / inside
        shutil.copytree(start, folder)
        index = folder / "model.safetensors.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
        weights = {name: tensor.to(dtype) for name, tensor in model.at(step).items()}
        for file in files:
            save_file({name: weights[name] for name in load_file(folder / file)}, folder / file, {"format": "pt"})
    return start, root / "run"


def run(root, out="trajectory", steps=None, options=None, **more):
    found = select_steps(find_checkpoints(root / "run"), steps)
    return ingest(str(root / "base"), found, "the run", root / out, options or Options(), **more)


def predicted(trajectory, target=40):
    shards = extrapolate(trajectory, trajectory.steps[-1], Prediction("relex", target))
    return {shard.name: shard.data for shard in shards}


@pytest.fixture
def finished(tmp_path):
    write_run(tmp_path)
    return tmp_path


@pytest.mark.parametrize("inside", [".", "actor/huggingface"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_checkpoint_comes_back(tmp_path, dtype, inside):
    write_run(tmp_path, dtype=dtype, inside=inside)
    trajectory = run(tmp_path)
    assert trajectory.steps == list(STEPS)
    assert trajectory.index.encoding == ("bf16" if dtype == torch.bfloat16 else "fp32-int8")
    for step in STEPS:
        bound = replay.error_bound(trajectory, step)
        truth = read(tmp_path / "run" / f"global_step_{step}" / inside)
        for shard in replay.states(trajectory, step):
            true = truth[shard.name].flatten().float()
            assert torch.allclose(shard.data.float(), true, rtol=1e-6, atol=bound * 1.001), (step, shard.name)
        if dtype == torch.bfloat16:
            assert bound == 0


@pytest.mark.parametrize("encoding", ["bf16", "fp32-int8"])
def test_the_same_bits_as_a_run_that_observed_itself(tmp_path, encoding):
    dtype = torch.bfloat16 if encoding == "bf16" else torch.float32
    start, _ = write_run(tmp_path, dtype=dtype)
    model = DriftingModel(read(start))
    observer = Observer(tmp_path / "online", str(start.resolve()), {}, {}, encoding)
    observer.start(RankSource(model.at(0)))
    observer.open(0)
    for step in STEPS:
        observer.observe(step, RankSource({name: one.to(dtype) for name, one in model.at(step).items()}))
    online, offline = Trajectory(tmp_path / "online"), run(tmp_path)
    assert torch.equal(replay.increment_gram(online), replay.increment_gram(offline))
    here, there = predicted(offline), predicted(online)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_ingesting_the_checkouts_gives_the_same_gram_and_prediction(finished):
    first = run(finished)
    for step in STEPS:
        folder = finished / "again" / f"step_{step}"
        folder.parent.mkdir(exist_ok=True)
        write_checkpoint(first, replay.states(first, step), folder, {}, first.encoding.dtype)
    second = ingest(str(finished / "base"), find_checkpoints(finished / "again"), "again", finished / "t2")
    assert torch.equal(replay.increment_gram(first), replay.increment_gram(second))
    here, there = predicted(first), predicted(second)
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_tied(tmp_path, tied):
    write_run(tmp_path, tied=tied, shard_size="100KB")
    trajectory = run(tmp_path)
    assert trajectory.index.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("lm_head.weight" in trajectory.names) is not tied


def test_steps_are_the_time_axis(tmp_path):
    """On a straight path, checkpoints every 4 steps predict what those of every step predict."""
    start = tiny_base(tmp_path / "base", dtype=torch.float32)
    base = read(start)
    for step in range(1, 13):
        folder = tmp_path / "run" / f"global_step_{step}"
        shutil.copytree(start, folder)
        line = {name: tensor + step * 2.0**-16 for name, tensor in base.items()}
        save_file(line, folder / "model.safetensors", {"format": "pt"})
    every = predicted(run(tmp_path, "every"), 100)
    sparse = predicted(run(tmp_path, "sparse", "4,8,12"), 100)
    assert all(torch.allclose(every[name].float(), sparse[name].float(), rtol=2**-7) for name in every)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = (base[name] + 100 * 2.0**-16).flatten().bfloat16()
    assert (every[name] == expected).float().mean() > 0.99


def test_an_interrupted_pass_goes_on(finished):
    whole = run(finished, "whole")

    def stop(seen):
        if seen.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(finished, progress=stop)
    assert Trajectory(finished / "trajectory").steps == [1, 2]
    seen = []
    resumed = run(finished, progress=lambda one: seen.append(one.step))
    assert seen == [5, 9]
    assert torch.equal(replay.increment_gram(whole), replay.increment_gram(resumed))
    assert run(finished, progress=lambda one: seen.append(one.step)).steps == list(STEPS)
    assert seen == [5, 9]


def change(root, step, how):
    path = root / "run" / f"global_step_{step}" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    how(tensors)
    save_file(tensors, path, {"format": "pt"})


NORM = "model.norm.weight"
BAD = {
    "shape": (lambda root: change(root, 5, lambda t: t.update({NORM: torch.ones(3).bfloat16()})), "has shape"),
    "dtype": (lambda root: change(root, 5, lambda t: t.update({NORM: t[NORM].float()})), "F32, in the first"),
    "missing tensor": (lambda root: change(root, 5, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "other model": (lambda root: change(root, 1, lambda t: t.update({"x.weight": torch.ones(2)})), "does not"),
    "far away": (lambda root: change(root, 1, lambda t: [one.mul_(-1) for one in t.values()]), "away from"),
    "truncated": (lambda root: (root / "run/global_step_5/model.safetensors").write_bytes(b"\0" * 100), "truncated"),
    "empty folder": (lambda root: (root / "run/global_step_5/model.safetensors").unlink(), "holds no checkpoint"),
    "twice": (lambda root: shutil.copytree(root / "run/global_step_5", root / "run/step_5"), "step 5 is there twice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(finished, kind):
    spoil, says = BAD[kind]
    spoil(finished)
    with pytest.raises(IngestError, match=says) as caught:
        run(finished)
    assert "\n" not in str(caught.value)
    assert not (finished / "trajectory").exists()


def test_a_missing_shard_file(tmp_path):
    write_run(tmp_path, shard_size="100KB")
    next(iter(sorted((tmp_path / "run/global_step_5").glob("model-*")))).unlink()
    with pytest.raises(IngestError, match=r"a file is missing.*model-00001"):
        run(tmp_path)
    assert not (tmp_path / "trajectory").exists()


def test_what_shows_only_while_reading_keeps_the_steps_before(finished):
    change(finished, 5, lambda tensors: tensors[NORM].fill_(torch.nan))
    with pytest.raises(IngestError, match=r"step 5 .*not finite.*steps 1-2 are kept"):
        run(finished)
    assert Trajectory(finished / "trajectory").steps == [1, 2]
    assert run(finished, "without", "1-2,9").steps == [1, 2, 9]


@pytest.mark.parametrize("after", [0, 2])
def test_no_space_left(finished, monkeypatch, after):
    saved, written = store.save_file, []

    def full_disk(tensors, path):
        saved(tensors, path)
        written.append(path)
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full_disk)
    with pytest.raises(IngestError, match="no space left") as caught:
        run(finished)
    assert ("steps 1-2 are kept" in str(caught.value)) == bool(after)
    assert (finished / "trajectory").exists() == bool(after)
    assert list(finished.rglob("*.tmp")) == []
    monkeypatch.undo()
    assert run(finished).steps == list(STEPS)


def test_no_space_for_a_checkpoint_leaves_no_half(finished, monkeypatch):
    trajectory = run(finished)

    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(trajectory, replay.states(trajectory, 1), finished / "checkout")
    assert [path for path in finished.iterdir() if "checkout" in path.name] == []


@pytest.mark.parametrize(
    ("steps", "says"),
    [("1-x", "give steps and ranges"), ("3-4", "the steps found are 1, 2, 5, 9"), ("", "give steps")],
)
def test_steps_that_cannot_be(finished, steps, says):
    with pytest.raises(IngestError, match=says):
        run(finished, steps=steps)


def test_a_folder_that_is_something_else_is_left_alone(finished):
    (finished / "trajectory").mkdir()
    (finished / "trajectory/notes.txt").write_text("mine")
    with pytest.raises(IngestError, match="is no trajectory"):
        run(finished)
    assert (finished / "trajectory/notes.txt").read_text() == "mine"


def test_another_trajectory_and_a_step_in_between_are_refused(finished):
    run(finished, steps="1,5")
    with pytest.raises(IngestError, match="without step 2"):
        run(finished)
    with pytest.raises(IngestError, match="holds another trajectory"):
        run(finished, options=Options(trajectory="fp32"))
    assert Trajectory(finished / "trajectory").steps == [1, 5]


def test_pickle_is_refused_unless_allowed_and_then_loaded_with_care(finished):
    exact = run(finished, "exact")
    for step in STEPS:
        path = finished / "run" / f"global_step_{step}" / "model.safetensors"
        torch.save(load_file(path), path.with_name("pytorch_model.bin"))
        path.unlink()
    with pytest.raises(IngestError, match="--allow-pickle"):
        run(finished)
    assert not (finished / "trajectory").exists()
    loaded = run(finished, options=Options(allow_pickle=True))
    assert torch.equal(replay.increment_gram(loaded), replay.increment_gram(exact))
    torch.save({"bad": Path}, finished / "run/global_step_1/pytorch_model.bin")
    with pytest.raises(IngestError, match="weights_only=True"):
        run(finished, "evil", options=Options(allow_pickle=True))


@pytest.mark.trainer
@pytest.mark.skipif(not REAL_SHARDS.exists(), reason="needs a checkpoint that verl's trainer wrote")
def test_verl_shards_through_verls_merger(tmp_path):
    actor = tmp_path / "run/global_step_4/actor"
    shutil.copytree(REAL_SHARDS, actor)
    base = tmp_path / "base"
    shutil.copytree(actor / "huggingface", base)
    for path in (actor / "huggingface").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(IngestError, match="--allow-pickle"):
        run(tmp_path)
    trajectory = run(tmp_path, options=Options(allow_pickle=True, any_base=True))
    truth = read(base)
    for shard in replay.states(trajectory, 4):
        assert torch.equal(shard.data, truth[shard.name].flatten().bfloat16()), shard.name
    (actor / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(IngestError, match=r"ranks \[1\] of 2 are missing"):
        run(tmp_path, "t2", options=Options(allow_pickle=True))


class StandInHub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of the Hub, from local folders: refs, the files of a revision, and their content."""

    root = Path()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        folders = sorted(self.root.iterdir())
        commits = {folder.name.replace("global_", ""): f"{i:040x}" for i, folder in enumerate(folders, 1)}
        by_commit = {commits[folder.name.replace("global_", "")]: folder for folder in folders}
        headers, content = {"Content-Type": "application/json"}, b""
        if path.endswith("/refs"):
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in commits.items()]
            content = json.dumps({"branches": refs, "tags": [], "converts": []}).encode()
        elif "/revision/" in path or "/tree/" in path:
            name = path.split("/revision/" if "/revision/" in path else "/tree/")[1].split("/")[0]
            commit = commits.get(name, name)
            files = [file for file in by_commit[commit].iterdir() if file.is_file()]
            if "/tree/" in path:
                listing = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in files]
                content = json.dumps(listing).encode()
            else:
                siblings = [{"rfilename": file.name} for file in files]
                content = json.dumps({"id": "some/run", "sha": commit, "siblings": siblings}).encode()
        elif "/resolve/" in path:
            name, file = path.split("/resolve/")[1].split("/", 1)
            commit = commits.get(name, name)
            content = (by_commit[commit] / file).read_bytes()
            headers = {"ETag": f'"{commit}-{file}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(finished, monkeypatch):
    handler = type("Hub", (StandInHub,), {"root": finished / "run"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield finished
        server.shutdown()


def test_revisions_of_a_hub_repository(hub, monkeypatch):
    local = run(hub, "local")
    opened = []
    download = ingesting.checkpoints._download

    def recorded(place, temporary):
        opened.append(temporary)
        return download(place, temporary)

    monkeypatch.setattr(ingesting.checkpoints, "_download", recorded)
    found = find_revisions("some/run", "step_{N}")
    assert [one.step for one in found] == list(STEPS)
    trajectory = ingest(str(hub / "base"), found, "hub:some/run", hub / "trajectory")
    assert torch.equal(replay.increment_gram(trajectory), replay.increment_gram(local))
    assert len(opened) >= len(STEPS)
    assert not any(folder.exists() for folder in opened)


def test_a_hub_that_has_no_such_revisions(hub, monkeypatch):
    with pytest.raises(IngestError, match="no revision named like iter_"):
        find_revisions("some/run", "iter_{N}")
    with pytest.raises(IngestError, match=r"write \{N\}"):
        find_revisions("some/run", "step")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(IngestError, match="--hub some/run"):
        find_revisions("some/run", "step_{N}")
