"""Checkpoints that call the base's tensors otherwise: one renaming for all, or transformers' own table."""

import json
import shutil

import pytest
import torch
from finished import read, run, write_run
from safetensors.torch import load_file, save_file

from relex_verl.offline.ingest import Checkpoint, IngestError
from relex_verl.offline.ingest.names import names_in
from relex_verl.trajectory import replay

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def finished(tmp_path):
    write_run(tmp_path)
    return tmp_path


def rename(root, how, steps=(1, 2, 5, 9), where="run"):
    """Other names in the checkpoints of some steps, or in the base; their true weights by the base's names."""
    true = {step: read(root / f"run/global_step_{step}") for step in steps}
    for folder in [root / "base"] if where == "base" else [root / f"run/global_step_{step}" for step in steps]:
        tensors = how(load_file(folder / "model.safetensors"))
        save_file({name: one.clone() for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return true


def prefixed(*prefixes):
    return lambda tensors: {"".join(prefixes) + name: one for name, one in tensors.items()}


INV = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
SAME = {
    "compiled": prefixed("_orig_mod."),
    "wrapped twice": prefixed("module.", "_orig_mod."),
    "peft, merged": prefixed("base_model.model."),
    "with a value head": lambda t: prefixed("pretrained_model.")(t) | {"v_head.summary.weight": torch.zeros(1, 128)},
    "a part": lambda t: {name.replace("model.", "model.language_model.", 1): one for name, one in t.items()},
    "without a part": lambda t: {name.removeprefix("model."): one for name, one in t.items()},
    "inside": lambda t: {name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): one for name, one in t.items()},
    "a buffer of its own": lambda t: t | INV,
    "a mask": lambda t: t | {"model.mask": torch.ones(4, dtype=torch.bool)},
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_weights_under_other_names(finished, kind):
    true = rename(finished, SAME[kind], steps=(1, 2, 9) if kind == "compiled" else (1, 2, 5, 9))
    trajectory = run(finished)
    assert trajectory.index.encoding == "bf16"
    for step, weights in true.items():
        for shard in replay.states(trajectory, step):
            assert torch.equal(shard.data, weights[shard.name].flatten()), (step, shard.name)


def test_a_buffer_of_the_base_alone_is_not_followed(finished):
    rename(finished, lambda t: t | INV, where="base")
    trajectory = run(finished)
    assert not set(INV) & set(trajectory.names)
    assert torch.equal(trajectory.base().read(next(iter(INV))), next(iter(INV.values())))


def test_a_tied_head_keeps_its_name(tmp_path):
    write_run(tmp_path, tied=True)
    rename(tmp_path, lambda t: prefixed("module.")({**t, HEAD: t[EMBEDDING]}))
    assert run(tmp_path, "tied").index.aliases == {HEAD: EMBEDDING}
    rename(tmp_path, lambda t: {**t, f"module.{HEAD}": t[f"module.{HEAD}"] * 2}, steps=(5,))
    with pytest.raises(IngestError, match=f"step 5 .*{HEAD} differs from {EMBEDDING}"):
        run(tmp_path, "untied")


@pytest.mark.parametrize("fused", ["checkpoints", "base"])
def test_experts_that_are_fused_on_one_side(tmp_path, fused):
    """transformers' own table of Qwen3-MoE says where each expert is."""
    from transformers import Qwen3MoeConfig

    size = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    experts = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    config = Qwen3MoeConfig(
        vocab_size=16, num_hidden_layers=1, architectures=["Qwen3MoeForCausalLM"], **size, **experts
    )
    single = {
        f"model.layers.0.mlp.experts.{i}.{part}_proj.weight": torch.randn(*((8, 4) if part == "down" else (4, 8)))
        for i in range(3)
        for part in ("gate", "up", "down")
    }
    stem = "model.layers.0.mlp.experts"
    rows = [torch.cat([single[f"{stem}.{i}.{part}_proj.weight"] for part in ("gate", "up")]) for i in range(3)]
    together = {
        f"{stem}.gate_up_proj": torch.stack(rows),
        f"{stem}.down_proj": torch.stack([single[f"{stem}.{i}.down_proj.weight"] for i in range(3)]),
    }
    sides = {"base": single, "there": together} if fused == "checkpoints" else {"base": together, "there": single}
    for side, tensors in sides.items():
        config.save_pretrained(tmp_path / side)
        save_file({name: one.contiguous() for name, one in tensors.items()}, tmp_path / side / "model.safetensors")
    base, there = Checkpoint(tmp_path / "base"), Checkpoint(tmp_path / "there")
    named = names_in(base, set(base.entries), there)
    assert (named.missing, named.unknown, named.untouched) == ([], [], [])
    there.named(named.sources)
    assert all(torch.equal(there.read(name), sides["base"][name]) for name in base.entries)


@pytest.mark.parametrize("says", [True, False])
def test_where_the_configuration_is_silent_the_class_says_whether_the_head_is_tied(tmp_path, says):
    """Gemma's head is its embedding although config.json does not say so; Qwen2's is not."""
    write_run(tmp_path, tied=False)
    for folder in (tmp_path / "base", *(tmp_path / "run").iterdir()):
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"})
    config = tmp_path / "base/config.json"
    content = json.loads(config.read_text())
    del content["tie_word_embeddings"]
    config.write_text(json.dumps({**content, "model_type": "gemma2" if says else "qwen2"}))
    assert run(tmp_path).index.aliases == ({HEAD: EMBEDDING} if says else {})


def test_another_model_is_still_another_model(finished):
    shutil.copytree(finished / "run", finished / "copy")
    rename(finished, lambda t: prefixed("module.")({**t, "extra.weight": torch.ones(2)}))
    with pytest.raises(IngestError, match=r"holds module\.extra\.weight, which the base does not \(1 such"):
        run(finished)
    shutil.rmtree(finished / "run")
    shutil.move(finished / "copy", finished / "run")
    rename(finished, lambda t: {**t, HEAD: t[HEAD][:50]})
    with pytest.raises(IngestError, match=r"vocabulary was resized.*resize_token_embeddings\(50\)"):
        run(finished)
