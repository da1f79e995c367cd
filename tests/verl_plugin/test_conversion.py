"""Parts found by marking rows are those that a converter makes, element by element."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relex_verl.verl_plugin.conversion import MOST_SINGLE, Convert, converted_parts

Converter = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def asked(converter: Converter, shape: tuple[int, ...]) -> Convert:
    """A converter of whole shards, asked as verl asks Megatron's: what was not given comes out as NaN."""

    def convert(positions: torch.Tensor, values: torch.Tensor) -> tuple:
        shard = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        shard.view(-1)[positions] = values
        slots = {name: tensor.flatten() for name, tensor in converter(shard).items()}
        shapes = [(name, tuple(tensor.shape)) for name, tensor in converter(shard).items()]
        found = [flat.isnan().logical_not().nonzero().flatten() for flat in slots.values()]
        values = torch.cat([flat[at] for flat, at in zip(slots.values(), found, strict=True)])
        return shapes, torch.tensor([len(at) for at in found]), torch.cat(found), values.long()

    return convert


def check(converter: Converter, shape: tuple[int, ...]) -> int:
    """Compare with the converter itself, on numbers that tell all elements apart; the runs that were found."""
    shard = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    parts = converted_parts(asked(converter, shape), shard.numel(), shape[-1])
    expected, runs = converter(shard), 0
    for part in parts:
        whole = expected[part.name]
        assert part.shape == tuple(whole.shape)
        data, filled = part.cut_out(shard.flatten()), torch.full((whole.numel(),), torch.nan, dtype=torch.float64)
        for local, full, length in part.placement.runs():
            filled[full : full + length] = data[local : local + length]
            runs += 1
        assert torch.equal(filled.nan_to_num(-1.0), whole.flatten().nan_to_num(-1.0))
    held = {name for name, whole in expected.items() if not whole.isnan().all()}
    assert {part.name for part in parts} == held
    return runs


def nans(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype)


def gathered(ranks: int, rank: int, dim: int) -> Converter:
    return lambda shard: {
        "w": torch.cat([shard if i == rank else torch.full_like(shard, torch.nan) for i in range(ranks)], dim)
    }


def gate_and_up(shard: torch.Tensor) -> dict[str, torch.Tensor]:
    gate, up = shard.chunk(2)
    return {
        "gate": torch.cat([torch.full_like(gate, torch.nan), gate]),
        "up": torch.cat([torch.full_like(up, torch.nan), up]),
    }


def grouped_qkv(shard: torch.Tensor) -> dict[str, torch.Tensor]:
    """Megatron's order: for each group its queries, its key, its value."""
    by_group = shard.view(2, 4, 3, shard.shape[-1])  # 2 groups of 2 queries, a key and a value; heads of 3
    return {
        "q": by_group[:, :2].reshape(-1, shard.shape[-1]),
        "k": by_group[:, 2].reshape(-1, shard.shape[-1]),
        "v": by_group[:, 3].reshape(-1, shard.shape[-1]),
    }


def experts(shard: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"experts.{i}.{name}": part
        for i, one in enumerate(shard)
        for name, part in zip("gu", one.chunk(2), strict=True)
    }


@pytest.mark.parametrize("columns", [2, 7, 64, 300])
@pytest.mark.parametrize(
    ("converter", "shape", "runs"),
    [
        (lambda shard: {"w": shard}, (5,), 1),
        (gathered(4, 2, 0), (6,), 1),
        (gathered(4, 2, 1), (6,), 6),
        (lambda shard: {"w": shard[:-3]}, (9,), 1),  # padding of the vocabulary
        (lambda shard: {"w": nans(shard, 4, 4)}, (9,), 0),  # nothing of it comes out: another rank's
        (gate_and_up, (8,), 2),
        (grouped_qkv, (24,), 5),
        (experts, (3, 4), 6),
        (lambda shard: {"w": shard.T.contiguous()}, (6,), None),  # element by element
        (lambda shard: {"w": shard.flip(0)}, (200,), None),
    ],
)
def test_the_parts_are_the_converters(
    converter: Converter, shape: tuple[int, ...], runs: int | None, columns: int
) -> None:
    found = check(converter, (*shape, columns))
    if runs is not None and columns > 2:
        assert found <= runs


@given(st.data())
def test_any_order_of_rows_over_any_number_of_tensors(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 9))
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    cut = data.draw(st.integers(0, rows))
    check(lambda shard: {"a": shard[order[:cut]], "b": shard[order[cut:]]}, (rows, columns))


@pytest.mark.parametrize("shape", [(4, 100), (400,)])
@pytest.mark.parametrize(
    "converter",
    [
        lambda shard: {"w": shard / 2},
        lambda shard: {"w": shard + 1},
        lambda shard: {"w": shard.clamp(max=20.0)},
        lambda shard: {"a": shard, "b": shard},
    ],
)
def test_a_converter_that_computes_or_repeats_is_refused(converter: Converter, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not handed out as they are stored"):
        converted_parts(asked(converter, shape), torch.Size(shape).numel(), shape[-1])


def test_a_large_weight_that_is_scattered_is_refused_before_an_index_is_made_for_each_element() -> None:
    shape = (2, MOST_SINGLE)
    with pytest.raises(ValueError, match="the rows of 1048576 do not stay whole"):
        converted_parts(asked(lambda shard: {"w": shard.T.contiguous()}, shape), 2 * MOST_SINGLE, MOST_SINGLE)


def test_an_empty_shard_has_no_parts() -> None:
    assert converted_parts(asked(lambda shard: {"w": shard}, (0, 4)), 0, 4) == []
