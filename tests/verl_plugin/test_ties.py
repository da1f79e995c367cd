"""Tied names: asked of real models of transformers, and of engines that have none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from architectures import base_of, has_images
from safetensors.torch import load_file, save_file

from relex_verl.verl_plugin.hub_layout import HubLayout
from relex_verl.verl_plugin.ties import tied_names

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


def engine_of(base: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    auto = transformers.AutoModelForImageTextToText if has_images(config) else transformers.AutoModelForCausalLM
    return SimpleNamespace(
        module=auto.from_pretrained(base), model_config=SimpleNamespace(hf_config=config, local_path=str(base))
    )


def ties_of(engine: Any) -> dict[str, str]:
    return tied_names(engine, HubLayout.of(engine))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_vl_tied", "qwen3_vl", "qwen3_vl_tied", "qwen3_vl_moe"])
def test_the_top_level_of_the_configuration_decides(name: str, tmp_path: Path) -> None:
    """The text's part of an untied Qwen3-VL-MoE says by default that it is tied."""
    engine = engine_of(base_of(name, tmp_path))
    assert ties_of(engine) == ({HEAD: EMBEDDING} if name.endswith("_tied") else {})
    if name == "qwen3_vl_moe":
        assert engine.model_config.hf_config.text_config.tie_word_embeddings
    layout = HubLayout.of(engine)
    assert layout.hub_name(EMBEDDING) == ("model.embed_tokens.weight" if "2" in name else EMBEDDING)


@pytest.mark.parametrize("stored", ["both", "head", "two values"])
def test_of_two_names_the_one_counts_that_the_checkpoint_has(stored: str, tmp_path: Path) -> None:
    base_of("qwen2_vl_tied", tmp_path)
    file = next(file for file in tmp_path.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(file))
    tensors = load_file(file)
    tensors[HEAD] = tensors["model.embed_tokens.weight"] + float(stored == "two values")
    if stored == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    for index in tmp_path.glob("*.index.json"):
        content = index.read_text().replace("model.embed_tokens.weight", HEAD)
        index.write_text(content)
    expected = {"both": {HEAD: EMBEDDING}, "head": {EMBEDDING: HEAD}, "two values": {}}[stored]
    assert ties_of(engine_of(tmp_path)) == expected


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (None, {HEAD: "model.embed_tokens.weight"}),
        ({HEAD: "model.wte.weight"}, {HEAD: "model.wte.weight"}),
    ],
)
def test_without_a_model_of_transformers_its_declaration_counts_or_the_usual_names(
    declared: Any, expected: dict[str, str]
) -> None:
    module = torch.nn.Linear(1, 1)
    module._tied_weights_keys = declared
    config = SimpleNamespace(tie_word_embeddings=True)
    engine = SimpleNamespace(module=module, model_config=SimpleNamespace(hf_config=config))
    assert ties_of(engine) == expected
    config.tie_word_embeddings, config.text_config = False, SimpleNamespace(tie_word_embeddings=True)
    assert ties_of(engine) == {}
