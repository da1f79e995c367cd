"""Adapters of a trajectory merged into their base, against peft's own merge of the adapter that is written."""

import json
from pathlib import Path

import pytest
import torch
from fakes import DriftingModel, RankSource, tiny_base
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pipeline import RUN
from safetensors.torch import load_file
from shell import call, finished, refused
from transformers import AutoModelForCausalLM

from relex_verl import extrapolate
from relex_verl.offline.merging import merged_tensors
from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.trajectory.kinds import KINDS

__all__ = ["finished"]

PLAIN = {"r": 4, "lora_alpha": 12}
PATTERNS = {**PLAIN, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.up_proj": 3, r"layers\.1\..*v_proj": 5}}
CONFIGS = {"plain": PLAIN, "patterns": PATTERNS, "rslora": {**PATTERNS, "use_rslora": True}}


def adapted(root: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """A trajectory of adapters of a tiny model, all of them drifting."""
    base = tiny_base(root / "base", tied=False, dtype=dtype)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    drifting = DriftingModel(get_peft_model_state_dict(model), rate=1e-2)
    content = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    observer = Observer(root / "trajectory", str(base), {}, RUN, KINDS["fp32-int8"], adapters=content)
    observer.start(RankSource(drifting.at(0)))
    observer.open(0)
    for step in range(1, 5):
        observer.observe(step, RankSource(drifting.at(step)))
    return root / "trajectory"


@pytest.fixture(scope="module", params=CONFIGS)
def trajectory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **CONFIGS[request.param])
    dtype = torch.bfloat16 if request.param == "plain" else torch.float32
    return adapted(tmp_path_factory.mktemp(request.param), config, dtype)


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Full weights in float64."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), adapter)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "command", [("checkout", "--step", 3), ("extrapolate", "--t-cut", 4, "--target", 9)], ids=lambda command: command[0]
)
def test_merged_is_what_peft_merges(trajectory: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    base, (name, *options) = trajectory.parent / "base", command
    folders = []
    for more in ((), ("--merge",)):
        out = tmp_path / ("merged" if more else "adapter")
        done = call(name, trajectory, *options, "--out", out, *more)
        assert done.exit_code == 0, done.output
        folders.append(out / "relex-step_9" if name == "extrapolate" else out)
    adapter, merged = folders
    assert {path.name for path in merged.iterdir()} == {path.name for path in base.iterdir()} | {"relex.json"}
    wanted, before = by_peft(base, adapter), load_file(base / "model.safetensors")
    tensors = load_file(merged / "model.safetensors")
    assert tensors.keys() == before.keys()
    for tensor_name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (before[tensor_name].dtype, before[tensor_name].shape)
        exact = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(tensor.double(), wanted[tensor_name], rtol=exact, atol=1e-7)
        assert torch.equal(tensor, before[tensor_name]) == ("proj.weight" not in tensor_name)
    AutoModelForCausalLM.from_pretrained(merged)


def test_an_adapter_and_its_merged_weights_do_not_replace_each_other(trajectory: Path, tmp_path: Path) -> None:
    for merge, said in ((False, "with"), (True, "without")):
        out = tmp_path / said
        extrapolate(trajectory, 9, 4, out=out, merge=merge)
        extrapolate(trajectory, 9, 4, out=out, merge=merge)
        with pytest.raises(ValueError, match=f"holds this prediction {'with' if merge else 'without'} --merge"):
            extrapolate(trajectory, 9, 4, out=out, merge=not merge)


def test_whole_weights_have_nothing_to_merge(finished: Path, tmp_path: Path) -> None:
    command = ("checkout", finished / "trajectory", "--step", 4, "--out", tmp_path / "out", "--merge")
    assert "follows whole weights" in refused(*command)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_tensor_by_tensor_is_refused(tmp_path: Path) -> None:
    base = BaseCheckpoint(tiny_base(tmp_path / "base", tied=True))
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    adapters = {f"{layer}.lora_A.weight": torch.ones(2, 128), f"{layer}.lora_B.weight": torch.ones(192, 2)}
    config = {"r": 2, "lora_alpha": 2}
    (whole,) = merged_tensors(base, adapters, config)
    torch.testing.assert_close(whole.data.view(whole.shape), base.read(whole.name).float() + 2)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' has changed the base's weights"):
        list(merged_tensors(base, adapters, {**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape"):
        list(merged_tensors(base, {**adapters, f"{layer}.lora_A.weight": torch.ones(2, 64)}, config))
    head = {name.replace("model.layers.0.mlp.up_proj", "lm_head"): tensor for name, tensor in adapters.items()}
    with pytest.raises(ValueError, match=r"has no lm_head\.weight, .* merge_and_unload"):
        list(merged_tensors(base, head, config))


def test_layers_that_keep_their_weights_transposed(tmp_path: Path) -> None:
    base = BaseCheckpoint(tiny_base(tmp_path / "base"))
    layer = "base_model.model.model.layers.0.mlp.up_proj"  # (192, 128): an input of 192 if it is transposed
    down, up = torch.randn(2, 192), torch.randn(128, 2)
    adapters = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    (whole,) = merged_tensors(base, adapters, {"lora_alpha": 6, "fan_in_fan_out": True})
    wanted = base.read(whole.name).double() + 3 * (up.double() @ down.double()).T
    torch.testing.assert_close(whole.data.view(whole.shape).double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_index_says_that_adapters_are_followed(trajectory: Path) -> None:
    index = json.loads((trajectory / "index.json").read_text())
    assert (index["adapters"], index["schema_version"]) == (True, 3)
    assert index["base_model"] == str(trajectory.parent / "base")
