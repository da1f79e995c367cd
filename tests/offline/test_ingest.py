"""Finished runs become trajectories: the same as those of the runs themselves, in one pass that can be interrupted."""

import errno
import shutil

import pytest
import torch
from fakes import tiny_base
from finished import NORM, STEPS, change, observed, predicted, read, run, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from relex_verl.offline.ingest import Found, IngestError, Options, find_checkpoints, ingest, select_steps, within
from relex_verl.pipeline.observer import Observer
from relex_verl.pipeline.prediction import write_checkpoint
from relex_verl.reporting.provenance import Checkout
from relex_verl.trajectory import files, replay
from relex_verl.trajectory.store import Trajectory


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
def test_the_same_bits_as_a_one_rank_run_that_observed_itself(tmp_path, encoding):
    dtype = torch.bfloat16 if encoding == "bf16" else torch.float32
    start, _ = write_run(tmp_path, dtype=dtype)
    online, offline = observed(tmp_path / "online", start.resolve(), encoding, 1), run(tmp_path)
    assert torch.equal(replay.increment_gram(online), replay.increment_gram(offline))
    here, there = predicted(offline), predicted(online)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("encoding", ["bf16", "bf16 of a float32 base", "fp32-int8", "fp32-int4"])
def test_the_checkouts_of_a_run_give_its_gram_and_predictions(tmp_path, encoding, world):
    """bf16: the same bits. fp32: float32 states without further loss, so the same up to the rounding of float32."""
    encoding, _, wide = encoding.partition(" ")
    base = tiny_base(tmp_path / "base", dtype=torch.float32 if wide else torch.bfloat16).resolve()
    online = observed(tmp_path / "online", base, encoding, world)
    (tmp_path / "checkouts").mkdir()
    for step in STEPS:
        facts = Checkout.of(step, replay.error_bound(online, step), "base", online.folder).to_json()
        folder = tmp_path / "checkouts" / f"step_{step}"
        dtype = None if encoding == "bf16" else torch.float32
        write_checkpoint(online, replay.states(online, step), folder, facts, dtype)
    again = ingest(str(base), find_checkpoints(tmp_path / "checkouts"), "checkouts", tmp_path / "again")
    exact = encoding == "bf16"
    assert again.index.encoding == ("bf16" if exact else "fp32-none")
    there, here = replay.window(online).gram_LTT, replay.window(again).gram_LTT
    largest_L11 = there.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None].clamp_min(1e-300)
    assert ((there - here).abs() / largest_L11).max() <= (1e-14 if exact else 1e-6)
    for target in (12, 40, 200):
        theirs, ours = predicted(online, target), predicted(again, target)
        differing = sum(int((theirs[name] != ours[name]).sum()) for name in theirs)
        assert differing <= (0 if exact else 1e-4 * online.elements)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_and_tied(tmp_path, tied):
    write_run(tmp_path, tied=tied, shard_size="100KB")
    trajectory = run(tmp_path)
    assert trajectory.index.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("lm_head.weight" in trajectory.names) is not tied


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_steps_are_the_time_axis(tmp_path, quantization):
    """On a straight path, checkpoints every 10 steps predict what those of every step predict."""
    start = tiny_base(tmp_path / "base", dtype=torch.float32)
    base = read(start)
    for step in range(1, 31):
        folder = tmp_path / "run" / f"global_step_{step}"
        shutil.copytree(start, folder)
        line = {name: tensor + step * 2.0**-18 for name, tensor in base.items()}
        save_file(line, folder / "model.safetensors", {"format": "pt"})
    options = Options(quantization=quantization)
    every = predicted(run(tmp_path, "every", options=options), 200)
    tenth = predicted(run(tmp_path, "tenth", "10,20,30", options=options), 200)
    same = [every[name].bfloat16() == tenth[name].bfloat16() for name in every]
    assert torch.cat(same).float().mean() > 0.99
    if quantization == "none":
        true = {name: (base[name].double() + 200 * 2.0**-18).flatten() for name in base}
        apart = torch.cat([(tenth[name].double() - true[name]).abs() / true[name].abs() for name in base])
        assert apart.quantile(0.99) <= 2**-8 * 1.01  # bfloat16's own rounding


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


def test_every_checkpoint_is_opened_once_also_when_a_pass_goes_on(finished, monkeypatch):
    opened, open_it = [], Found.opened

    def recorded(self, *how):
        opened.append(self.step)
        return open_it(self, *how)

    monkeypatch.setattr(Found, "opened", recorded)
    run(finished, steps="1-2")
    assert opened == [1, 2]
    run(finished)
    assert opened == [1, 2, 5, 9]
    run(finished)
    assert opened == [1, 2, 5, 9]


def test_what_shows_only_while_reading_keeps_the_steps_before(finished):
    change(finished, 5, lambda tensors: tensors[NORM].fill_(torch.nan))
    with pytest.raises(IngestError, match=r"step 5 .*not finite.*steps 1-2 are kept"):
        run(finished)
    assert Trajectory(finished / "trajectory").steps == [1, 2]
    assert run(finished, "without", "1-2,9").steps == [1, 2, 9]


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_no_space_left(finished, monkeypatch, after, there):
    saved, written = files.save_file, []

    def full_disk(tensors, path, metadata):
        saved(tensors, path, metadata)
        written.append(path)
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    if there:
        (finished / "trajectory").mkdir()
    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(IngestError, match=r"--out .*trajectory: no space left") as caught:
        run(finished)
    assert ("steps 1-2 are kept" in str(caught.value)) == bool(after)
    assert (finished / "trajectory").exists() == bool(after or there)
    if not after:
        assert list(finished.glob("trajectory/*")) == []
    assert list(finished.rglob("*.tmp")) == []
    monkeypatch.undo()
    assert run(finished).steps == list(STEPS)


def test_a_pass_that_cannot_even_begin_again_keeps_what_is_there(finished, monkeypatch):
    run(finished, steps="1-2")

    def broken(self, *anything):
        raise MemoryError("no memory for the state")

    monkeypatch.setattr(Observer, "start", broken)
    with pytest.raises(MemoryError):
        run(finished)
    monkeypatch.undo()
    assert Trajectory(finished / "trajectory").steps == [1, 2]
    assert run(finished).steps == list(STEPS)


def test_no_space_for_a_checkpoint_leaves_no_half(finished, monkeypatch):
    trajectory = run(finished)

    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(trajectory, replay.states(trajectory, 1), finished / "checkout")
    assert [path for path in finished.iterdir() if "checkout" in path.name] == []


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
    for options in (Options(trajectory="fp32"), Options(trajectory="fp32", quantization="int4")):
        with pytest.raises(IngestError, match=r"holds another trajectory \(encoding bf16"):
            run(finished, options=options)
    with pytest.raises(IngestError, match="holds another trajectory"):
        ingest(str(finished / "base"), find_checkpoints(finished / "run"), "another run", finished / "trajectory")
    assert Trajectory(finished / "trajectory").steps == [1, 5]


def test_a_pass_goes_on_in_the_encoding_in_which_it_began(tmp_path):
    write_run(tmp_path, dtype=torch.float32)
    run(tmp_path, steps="1-2", options=Options(quantization="int4"))
    assert run(tmp_path).index.encoding == "fp32-int4"
    with pytest.raises(IngestError, match="holds another trajectory"):
        run(tmp_path, options=Options(quantization="int8"))


def test_a_pass_that_began_in_bfloat16_does_not_round_what_comes_later(finished):
    run(finished, steps="1-2")
    for step in (1, 2):
        shutil.rmtree(finished / "run" / f"global_step_{step}")
    for step in (5, 9):
        change(finished, step, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    with pytest.raises(IngestError, match="steps recorded before are bfloat16"):
        run(finished)
    assert run(finished, options=Options(trajectory="bf16")).steps == list(STEPS)


@pytest.mark.parametrize("options", [{"trajectory": "fp8"}, {"quantization": "int2"}])
def test_options_that_cannot_be(options):
    [(name, value)] = options.items()
    with pytest.raises(IngestError, match=f"--{name} {value}: give one of"):
        Options(**options)


@pytest.mark.parametrize(
    ("steps", "says"),
    [("1-x", "give steps and ranges"), ("3-4", "the steps found are 1, 2, 5, 9"), ("", "give steps")],
)
def test_steps_that_cannot_be(finished, steps, says):
    with pytest.raises(IngestError, match=says):
        run(finished, steps=steps)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=4))
@settings(deadline=None)
def test_ranges_of_steps_are_those_steps(ranges):
    text = ",".join(f"{low}-{low + more}" if more else str(low) for low, more in ranges)
    expected = {step for low, more in ranges for step in range(low, low + more + 1)}
    assert {step for step in range(40) if within(text)(step)} == expected
    found = [Found(step, "safetensors", "there") for step in range(40)]
    assert {one.step for one in select_steps(found, text)} == expected
