import errno
import itertools
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from relex_verl.hf_checkpoint import INDEX_NAME, BaseCheckpoint, CheckpointWriter, resolve_model, write_json
from relex_verl.shards import Placement, TensorShard, block_placement, placement_of_positions, whole

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request, tmp_path_factory):
    """A small real model in several files, with the odd other file beside them."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=request.param == "tied",
    )
    Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size="6KB")
    (folder / "vocab.txt").write_text("a b c")
    (folder / "pytorch_model.bin").write_bytes(b"old weights in another format")
    checkpoint = BaseCheckpoint(folder)
    assert len({entry.file for entry in checkpoint.entries.values()}) > 2
    assert (HEAD in checkpoint.entries) == (request.param == "untied")
    return checkpoint


def new_values(base, seed=1, dtype=torch.bfloat16):
    """Other weights for every tensor of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(entry.shape, generator=generator).to(dtype) for name, entry in sorted(base.entries.items())
    }


def write_whole(base, folder, values, aliases=(), dtype=torch.bfloat16, provenance=None):
    writer = CheckpointWriter(base, folder, set(values), dict(aliases), dtype)
    writer.begin()
    for name, value in values.items():
        writer.write(TensorShard(name, tuple(value.shape), whole(value.shape), value.flatten()))
    return writer.commit(provenance)


def cut_up(name, value, rng):
    """The shards of one tensor as some four ranks could hold it: rows, columns, or scattered runs; some empty."""
    way, shape = rng.choice(["rows", "columns", "scattered"]), tuple(value.shape)
    if way == "scattered":
        owner = torch.tensor([rng.randrange(4) for _ in range(value.numel())])
        placements = [placement_of_positions((owner == rank).nonzero().flatten()) for rank in range(4)]
    else:
        dim = 0 if way == "rows" else len(shape) - 1
        cuts = [0, *sorted(rng.randrange(shape[dim] + 1) for _ in range(3)), shape[dim]]
        placements = []
        for start, stop in itertools.pairwise(cuts):
            local = [*shape[:dim], stop - start, *shape[dim + 1 :]]
            offset = [start if d == dim else 0 for d in range(len(shape))]
            placements.append(block_placement(tuple(local), tuple(offset), shape))
    flat = value.flatten()
    for placement in placements:
        parts = [flat[full : full + length] for _, full, length in placement.runs()]
        yield TensorShard(name, shape, placement, torch.cat([flat[:0], *parts]))


def content(folder):
    """Bytes of every file in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_loads_what_was_written(base, tmp_path, dtype):
    values = new_values(base, dtype=dtype)
    folder = write_whole(base, tmp_path / "out", values, dtype=dtype)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == dtype
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    state = model.state_dict()
    for name, value in values.items():
        assert torch.equal(state[name], value), name
    if HEAD not in values:
        assert torch.equal(state[HEAD], values[EMBEDDING])
    assert set(state) - set(values) <= {HEAD}


def test_layout_is_that_of_the_base(base, tmp_path):
    values = new_values(base)
    writer = CheckpointWriter(base, tmp_path / "out", set(values), {})
    folder = write_whole(base, tmp_path / "out", values)
    again = BaseCheckpoint(folder)
    assert list(again.entries) == list(base.entries)
    for name, entry in again.entries.items():
        assert (entry.file, entry.shape) == (base.entries[name].file, base.entries[name].shape)
        assert entry.dtype == "BF16"
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: entry.file for name, entry in base.entries.items()}
    assert index["metadata"]["total_size"] == writer.nbytes == sum(2 * value.numel() for value in values.values())
    assert (folder / "vocab.txt").read_text() == "a b c"
    assert not (folder / "pytorch_model.bin").exists()
    assert not (folder / "relex.json").exists()
    for file in {entry.file for entry in again.entries.values()}:
        assert load_file(folder / file)  # safetensors' own reader finds no fault
        assert (
            int.from_bytes((folder / file).read_bytes()[:8], "little") % 8 == 0
        )  # the header, so that data is aligned


@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order_equal_the_whole(base, tmp_path, seed):
    rng, values = random.Random(seed), new_values(base, seed)
    shards = [shard for name, value in values.items() for shard in cut_up(name, value, rng)]
    rng.shuffle(shards)
    writers = [CheckpointWriter(base, tmp_path / "pieces", set(values), {}) for _ in range(3)]  # one a rank
    writers[0].begin()
    for shard in shards:
        rng.choice(writers).write(shard)
    writers[2].commit()
    assert content(tmp_path / "pieces") == content(write_whole(base, tmp_path / "whole", values))


def test_shards_are_rounded_to_the_type_of_the_file(base, tmp_path):
    values = {EMBEDDING: new_values(base, dtype=torch.float32)[EMBEDDING]}
    folder = write_whole(base, tmp_path / "out", values)
    assert torch.equal(BaseCheckpoint(folder).read(EMBEDDING), values[EMBEDDING].bfloat16())


def test_tensors_that_are_not_observed_keep_every_bit_and_their_type(base, tmp_path):
    observed = {EMBEDDING: new_values(base)[EMBEDDING]}
    folder = write_whole(base, tmp_path / "out", observed)
    again = BaseCheckpoint(folder)
    for name, entry in again.entries.items():
        expected = observed.get(name, base.read(name))
        assert entry.dtype == ("BF16" if name in observed else "F32")
        assert torch.equal(again.read(name), expected)


def test_a_tied_name_in_the_files_gets_its_elements_too(base, tmp_path):
    values = new_values(base)
    values.pop(HEAD, None)
    folder = write_whole(base, tmp_path / "out", values, aliases={HEAD: EMBEDDING})
    again = BaseCheckpoint(folder)
    assert (HEAD in again.entries) == (HEAD in base.entries)
    for name in again.entries:
        assert torch.equal(again.read(name), values[EMBEDDING if name == HEAD else name])


def test_a_crash_before_commit_leaves_no_destination_and_the_next_attempt_works(base, tmp_path):
    folder, values = tmp_path / "runs" / "out", new_values(base)
    crashed = CheckpointWriter(base, folder, set(values), {})
    crashed.begin()
    crashed.write(TensorShard(EMBEDDING, (50, 16), Placement((0,), (3,)), torch.ones(3, dtype=torch.bfloat16)))
    (crashed.partial / "left over").write_text("")
    assert not folder.exists()
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
        monkeypatch.setattr("shutil.copy", out_of_space)
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


@pytest.mark.parametrize("seed", range(3))
def test_reading_a_placement_gives_its_elements_in_its_order(base, seed):
    rng = random.Random(seed)
    for name in base.entries:
        for shard in cut_up(name, base.read(name), rng):
            assert torch.equal(base.read(name, shard.placement), shard.data)
    backwards = placement_of_positions(torch.tensor([7, 3, 4, 0]))
    assert torch.equal(base.read(EMBEDDING, backwards), base.read(EMBEDDING).flatten()[[7, 3, 4, 0]])


def test_one_file_of_many_types_scalars_and_empty_tensors(tmp_path):
    tensors = {
        "weight": torch.randn(3, 5),
        "odd": torch.randn(3),  # as bfloat16 six bytes: what follows is no longer aligned
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "steps": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "half": torch.randn(4).half(),
    }
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    observed = {name: torch.full(tensors[name].shape, 7.0).bfloat16() for name in ("odd", "scalar", "empty")}
    folder = write_whole(BaseCheckpoint(tmp_path / "base"), tmp_path / "out", observed)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    again = load_file(folder / "model.safetensors")
    assert set(again) == set(tensors)
    for name, value in again.items():
        expected = observed.get(name, tensors[name])
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def test_one_file_under_a_numbered_name_needs_its_index(tmp_path):
    """transformers finds model-00001-of-00001.safetensors only by way of an index."""
    base, name = tmp_path / "base", "model-00001-of-00001.safetensors"
    base.mkdir()
    save_file({"a": torch.ones(2)}, base / name)
    (base / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    folder = write_whole(BaseCheckpoint(base), tmp_path / "out", {"a": torch.zeros(2).bfloat16()})
    assert json.loads((folder / INDEX_NAME).read_text())["weight_map"] == {"a": name}


def test_files_that_the_index_does_not_name_are_not_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(ValueError, match="a stands in both"):
        BaseCheckpoint(tmp_path)
    weight_map = {"a": "model-00001-of-00001.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert list(BaseCheckpoint(tmp_path).entries) == ["a"]


def test_a_folder_without_safetensors_is_refused_with_the_cure(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="Convert the model once"):
        BaseCheckpoint(tmp_path)


def test_a_folder_is_its_own_model(tmp_path, monkeypatch):
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve_model(f"~/{tmp_path.name}") == tmp_path


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("/moved/model", "/moved/model is no folder: it was moved"),
        ("./model", "is no folder"),
        ("../model", "is no folder"),
        ("~/no/such/model", "is no folder"),
        ("~nobody-at-all/model", "is no folder"),
        ("hdfs://node/model", "is an address: copy the model"),
        ("owner/model", "owner/model is neither a folder nor a model that the Hub gives us: "),
        ("three/part/name", "three/part/name is neither"),
    ],
)
def test_a_model_that_is_nowhere_is_one_clear_line(model, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=re.escape(says)) as caught:
        resolve_model(model)
    assert "\n" not in str(caught.value)


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
