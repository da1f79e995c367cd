"""What is refused by the base model's files: real checkpoints, written by transformers, and what people do to them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from verl_config import composed

from relex_verl.run.config import ConfigError
from relex_verl.verl_plugin.base_files import folder_of
from relex_verl.verl_plugin.settings import checked_config


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model in several files, to be spoilt."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def check(model: str | Path, *overrides: str) -> None:
    checked_config(composed(f"actor_rollout_ref.model.path={model}", *overrides))


def test_a_checkpoint_passes(model: Path) -> None:
    check(model)


def pickled(model: Path) -> None:
    for file in model.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    (model / "model.safetensors.index.json").unlink()


def declared(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))


def declared_below(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config = {"text_config": {**config, "quantization_config": {"quant_method": "mxfp4"}}}
    (model / "config.json").write_text(json.dumps(config))


def scaled(model: Path) -> None:
    """As DeepSeek stores its weights, the configuration cleaned."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if name.endswith("down_proj.weight"))
    index["weight_map"][f"{name}_scale_inv"] = index["weight_map"][name]
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def scaled_without_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        scales = {f"{name}_scale_inv": torch.ones(1) for name in tensors if name.endswith("proj.weight")}
        save_file({**tensors, **scales}, file)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (pickled, r"has .*\.bin and no safetensors: convert the model once"),
        (declared, r"declares quantization_config \(fp8\).*in bfloat16 or float32"),
        (declared_below, r"declares quantization_config \(mxfp4\)"),
        (scaled, "its checkpoint has .*down_proj.weight_scale_inv"),
        (scaled_without_index, "its checkpoint has .*_proj.weight_scale_inv"),
    ],
)
def test_a_base_that_cannot_be_followed_is_refused(spoil: Callable[[Path], None], says: str, model: Path) -> None:
    spoil(model)
    with pytest.raises(ConfigError, match=rf"actor_rollout_ref.model.path='{model}': .*{says}"):
        check(model)


def test_a_configuration_of_its_own_is_read_where_it_lies(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    declared(other)
    with pytest.raises(ConfigError, match=rf"hf_config_path='{other}': its config.json declares"):
        check(model, f"actor_rollout_ref.model.hf_config_path={other}")


MEGATRON = ["model_engine=megatron", "actor_rollout_ref.actor.megatron.use_dist_checkpointing=true"]


def test_a_configuration_alone_may_be_completed_on_the_ranks_but_not_by_megatrons_own_format(model: Path) -> None:
    for file in model.glob("*.safetensors*"):
        file.unlink()
    check(model)
    with pytest.raises(ConfigError, match="the folder holds no safetensors"):
        check(model, *MEGATRON)


def test_what_is_not_here_or_not_readable_says_nothing(model: Path, tmp_path: Path) -> None:
    check(tmp_path / "nowhere")
    check("'~/nowhere'")
    check("some/model-that-nobody-has")
    check("'<path to the model>'")
    (model / "config.json").write_text("{")
    (model / "model.safetensors.index.json").write_text("{")
    check(model)


def test_a_model_of_the_hub_is_looked_at_in_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert folder_of("some/model") is None
    cached = tmp_path / "hub" / "models--some--model"
    declared(model)
    shutil.copytree(model, cached / "snapshots" / f"{1:040x}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(f"{1:040x}")
    assert folder_of("some/model") == cached / "snapshots" / f"{1:040x}"
    with pytest.raises(ConfigError, match=r"path='some/model': its config.json declares"):
        check("some/model")


def test_a_home_is_resolved(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pickled(model)
    with pytest.raises(ConfigError, match="no safetensors"):
        check("'~/model'")
