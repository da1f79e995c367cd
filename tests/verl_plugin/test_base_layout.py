"""What is refused by how the base's tensors stand to the parameters: checkpoints that transformers wrote."""

import json
from pathlib import Path

import pytest
import transformers
from architectures import ARCHITECTURES, EXPERTS, TEXT, base_of
from safetensors.torch import load_file, save_file
from verl_config import composed

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.base_layout import check_layout


def check(folder: Path, *overrides: str) -> None:
    check_layout(composed(f"actor_rollout_ref.model.path={folder}", *overrides))


def test_what_is_followed_passes(tmp_path: Path) -> None:
    """The engines of these follow every element, see test_hub_layout.py."""
    for name in ARCHITECTURES:
        check(base_of(name, tmp_path / name))


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """A checkpoint in which transformers 5 cuts one tensor into several parameters."""
    config = transformers.HrmTextConfig(**TEXT, head_dim=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "joined")
    return tmp_path / "joined"


def test_what_transformers_would_join_is_refused(joined: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=.*q_proj.*gqkv_proj\.weight is computed anew.*Train another"):
        check(joined)


@pytest.mark.parametrize(
    "override",
    [
        "model_engine=megatron",  # has a converter of its own
        "actor_rollout_ref.model.lora_rank=8",  # the base is left as it is
        "+actor_rollout_ref.model.override_config.num_hidden_layers=1",
    ],
)
def test_what_another_look_has_to_tell_passes(joined: Path, override: str) -> None:
    check(joined, override)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = base_of("qwen3_moe", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"tensors of the engine are not in the base checkpoint .*layers\.2\."):
        check(folder)
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 60}))
    with pytest.raises(ConfigError, match=r"has shape \(60, 16\) in the engine, \(64, 16\) in the base checkpoint"):
        check(folder)


def test_what_cannot_be_built_here_is_left_to_verl(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody_knows", "architectures": ["Nobody"]}))
    check(tmp_path)
    folder = base_of("qwen3_moe", tmp_path / "half")
    next(folder.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1")
    check(folder)


def test_what_the_checkpoint_has_besides_does_not_matter(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mtp.norm.weight": tensors["model.norm.weight"].clone()}, file, {"format": "pt"})
    check(tmp_path)
