"""Blocks against plain indexing: flat ranges, views, and shards of converted parameters cut anywhere."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from architectures import base_of, has_images
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.trajectory.hf_checkpoint import BaseCheckpoint
from relex_verl.verl_plugin.blocks import blocks_of_range, pieces_of_views
from relex_verl.verl_plugin.hub_layout import HubLayout

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_a_flat_range_is_its_blocks_one_after_the_other(shape: tuple[int, ...], data: Any) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    stop = data.draw(st.integers(1, tensor.numel()))
    start = data.draw(st.integers(0, stop - 1))
    found = [
        tensor[tuple(slice(at, at + n) for at, n in zip(box.start, box.length, strict=True))].flatten()
        for box in blocks_of_range(shape, start, stop)
    ]
    assert torch.cat(found).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_views_tell_their_blocks_and_what_is_none_is_refused() -> None:
    tensor = torch.arange(2 * 6 * 4).view(2, 6, 4)
    gate, up = tensor.chunk(2, dim=1)
    views = {"gate": gate[1], "up": up.transpose(1, 2), "all": tensor, "row": tensor[:1, 2:3]}
    for piece in pieces_of_views(tensor, views.items()):
        block = tensor[tuple(slice(at, at + n) for at, n in zip(piece.box.start, piece.box.length, strict=True))]
        left = [axis for axis in range(3) if axis not in piece.axes]
        assert torch.equal(block.permute(*left, *piece.axes).reshape(piece.shape), views[piece.name])
    for name, view in {"copy": tensor.clone(), "flat": tensor.view(12, 4), "every other": tensor[:, ::2]}.items():
        with pytest.raises(ValueError, match=name):
            pieces_of_views(tensor, [(name, view)])


def model_of(base: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(base)
    auto = transformers.AutoModelForImageTextToText if has_images(config) else transformers.AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_a_shard_that_begins_and_ends_anywhere_is_found_in_the_checkpoint_and_can_be_set(
    name: str, tmp_path: Path
) -> None:
    """Also in the middle of a row of an expert that lies the other way round in the checkpoint."""
    base = BaseCheckpoint(base_of(name, tmp_path))
    model = model_of(tmp_path)
    key = next(key for key, _ in model.named_parameters() if key.endswith("experts.down_proj"))
    whole = model.get_parameter(key).detach().flatten()
    layout = HubLayout(model, base)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        start, stop = sorted(torch.randint(0, len(whole) + 1, (2,), generator=generator).tolist())
        shard = torch.cat([torch.zeros(3), whole[start:stop]])[3:]  # a view, as of a flat parameter
        parts = layout.parts(key, tuple(model.get_parameter(key).shape), start, shard)
        assert sum(part.placement.numel for part in parts) == stop - start
        again = torch.full_like(shard, torch.nan)
        for part in parts:
            if name == "qwen3_moe":  # what lies together is not copied
                assert part.cut_out(shard).untyped_storage().data_ptr() == shard.untyped_storage().data_ptr()
            assert torch.equal(part.cut_out(shard), base.read(part.name, part.placement).float())
            part.put(again, part.cut_out(shard))
        assert torch.equal(again, shard)


def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    base = BaseCheckpoint(base_of("qwen3_moe", tmp_path))
    model = model_of(tmp_path)
    key, tensor = next((key, one) for key, one in model.named_parameters() if "gate_up_proj" in key)
    shape, shard = tuple(tensor.shape), tensor.detach().flatten()
    with pytest.raises(ValueError, match=f"{key} is not what transformers is known to make of "):
        HubLayout(model, base).parts(key, shape, 0, shard.flip(0))
    summed = SimpleNamespace(
        config=model.config,
        _weight_conversions=[
            transformers.WeightConverter(
                ["mlp.experts.*.gate_proj.weight"], ["mlp.experts.gate_up_proj"], operations=[Sum()]
            )
        ],
    )
    with pytest.raises(ValueError, match=rf"{key} is not in the base .* cannot be followed \(.* is computed anew\)"):
        HubLayout(summed, base).parts(key, shape, 0, shard)


class Sum:
    """A conversion that computes new values."""

    @property
    def reverse_op(self) -> "Sum":
        return self

    def convert(self, tensors: dict[str, list[torch.Tensor]], **_: Any) -> dict[str, torch.Tensor]:
        return {"mlp.experts.0.gate_proj.weight": next(iter(tensors.values()))[0].sum(0)}
