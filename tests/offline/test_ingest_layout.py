"""Bad checkpoints are told in one line before anything is written."""

import json
import shutil

import pytest
import torch
from finished import NORM, change, read, run, write_run
from safetensors.torch import load_file, save_file

from relex_verl.offline.ingest import Checkpoint, IngestError, Options
from relex_verl.offline.ingest.layout import check_same_origin

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def finished(tmp_path):
    write_run(tmp_path)
    return tmp_path


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


@pytest.mark.parametrize(("share", "accepted"), [(0.005, True), (0.02, True), (0.2, False)])
def test_another_base_is_told_by_how_far_the_weights_lie_apart(finished, share, accepted):
    """Noise of 20 % of each tensor's spread is no reinforcement learning; 2 % can be."""
    torch.manual_seed(0)
    base = finished / "base/model.safetensors"
    noisy = {
        name: (tensor.float() + share * tensor.float().std(correction=0) * torch.randn(tensor.shape)).bfloat16()
        for name, tensor in load_file(base).items()
    }
    save_file(noisy, base, {"format": "pt"})
    if accepted:
        run(finished)
        return
    with pytest.raises(IngestError, match=r"step 1 .* lies 0\.2 \|theta_0\| away .*--any-base"):
        run(finished)
    assert not (finished / "trajectory").exists()
    run(finished, options=Options(any_base=True))


def test_a_base_of_zeros_is_compared_with_nothing(tmp_path):
    for name in ("base", "checkpoint"):
        (tmp_path / name).mkdir()
        save_file({NORM: torch.zeros(4)}, tmp_path / name / "model.safetensors")
    check_same_origin(Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "checkpoint"), [NORM])


@pytest.mark.parametrize("where", ["base", "run/global_step_5"])
def test_a_stored_head_that_is_not_the_embedding_is_not_taken_for_tied(tmp_path, where):
    write_run(tmp_path, tied=True)
    path = tmp_path / where / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, path, {"format": "pt"})
    run(tmp_path, "same")  # written twice, but the same
    save_file({**tensors, HEAD: tensors[EMBEDDING] * 2}, path, {"format": "pt"})
    with pytest.raises(IngestError, match=f"{HEAD} differs from {EMBEDDING}.*tie_word_embeddings"):
        run(tmp_path, "different")


def test_the_top_level_of_the_configuration_says_whether_the_head_is_tied(tmp_path):
    """The text's part of an untied Qwen3-VL-MoE says by default that it is."""
    write_run(tmp_path, tied=False)
    config = tmp_path / "base" / "config.json"
    content = {**json.loads(config.read_text()), "text_config": {"tie_word_embeddings": True}}
    assert content["tie_word_embeddings"] is False
    config.write_text(json.dumps(content))
    assert run(tmp_path, "said").index.aliases == {}
    del content["tie_word_embeddings"]
    config.write_text(json.dumps(content))
    assert run(tmp_path, "silent").index.aliases == {}


def test_messages_call_a_checkpoint_by_its_step_and_place(finished):
    (finished / "copy").mkdir()
    (finished / "copy/model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    with pytest.raises(IngestError, match=r"^step 5 \(here\): a file is missing: .*model\.safetensors") as caught:
        Checkpoint(finished / "copy", "step 5 (here)")
    assert str(finished) not in str(caught.value)
    assert read(finished / "base").keys() == Checkpoint(finished / "base").entries.keys()


def test_an_index_that_lists_more_than_the_files_hold(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index = '{"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(IngestError, match=r"lists b, which model\.safetensors does not hold"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"metadata": {}}'], ids=["no JSON", "no weight_map"])
def test_a_damaged_index(tmp_path, content):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(IngestError, match="is truncated or damaged"):
        Checkpoint(tmp_path)


def test_a_damaged_config_of_the_base(finished):
    (finished / "base/config.json").write_text("{")
    with pytest.raises(IngestError, match=r"config\.json is damaged"):
        run(finished)


def test_a_run_that_goes_on_is_not_asked_again_where_it_started(finished):
    """Late in a run weights may have moved further than the first checkpoint had."""
    run(finished, steps="1-2")
    change(finished, 9, lambda tensors: [one.mul_(1.1) for name, one in tensors.items() if name != NORM])
    assert run(finished).steps == [1, 2, 5, 9]
