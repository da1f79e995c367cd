"""The format: what is read and written are safetensors checkpoints that other libraries load."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from written import EMBEDDING, HEAD, base, content, cut_up, new_values, write_whole

from relex_verl.trajectory.checkpoint_writer import CheckpointWriter
from relex_verl.trajectory.hf_checkpoint import INDEX_NAME, BaseCheckpoint, resolve_model
from relex_verl.trajectory.shards import placement_of_positions

__all__ = ["base"]


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
        assert entry == base.entries[name]
    index = json.loads((folder / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: entry.file for name, entry in base.entries.items()}
    assert index["metadata"]["total_size"] == writer.nbytes == sum(4 * value.numel() for value in values.values())
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
    folder = write_whole(base, tmp_path / "out", values, dtype=torch.bfloat16)
    assert torch.equal(BaseCheckpoint(folder).read(EMBEDDING), values[EMBEDDING].bfloat16())


def test_tensors_that_are_not_observed_keep_every_bit_and_their_type(base, tmp_path):
    observed = {EMBEDDING: new_values(base)[EMBEDDING]}
    folder = write_whole(base, tmp_path / "out", observed, dtype=torch.bfloat16)
    again = BaseCheckpoint(folder)
    for name, entry in again.entries.items():
        expected = observed.get(name, base.read(name))
        assert entry.dtype == ("BF16" if name in observed else "F32")
        assert torch.equal(again.read(name), expected)


STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("followed", [torch.float32, torch.bfloat16])
def test_each_tensor_keeps_the_type_of_the_base_and_what_never_moved_its_bits(tmp_path, followed):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(50, dtype=torch.float64, generator=generator).to(dtype) for name, dtype in STORED.items()
    }
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    seen = {name: tensor.to(followed) for name, tensor in tensors.items()}
    for tensor in seen.values():
        tensor[::2] += 1
    base = BaseCheckpoint(tmp_path / "base")
    again = load_file(write_whole(base, tmp_path / "out", seen, followed=followed) / "model.safetensors")
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name][::2], seen[name][::2].to(tensor.dtype))
        assert torch.equal(again[name][1::2], tensor[1::2])


def test_a_tied_name_in_the_files_gets_its_elements_too(base, tmp_path):
    values = new_values(base)
    values.pop(HEAD, None)
    folder = write_whole(base, tmp_path / "out", values, aliases={HEAD: EMBEDDING})
    again = BaseCheckpoint(folder)
    assert (HEAD in again.entries) == (HEAD in base.entries)
    for name in again.entries:
        assert torch.equal(again.read(name), values[EMBEDDING if name == HEAD else name])


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
    folder = write_whole(BaseCheckpoint(tmp_path / "base"), tmp_path / "out", observed, dtype=torch.bfloat16)
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
