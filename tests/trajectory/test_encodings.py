"""Encodings against dense arithmetic: exact for bf16, bounded for fp32; packing round-trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_verl.maths.extrapolators import line_hat
from relex_verl.trajectory.encodings import PackedStep, quantized, sparse
from relex_verl.trajectory.kinds import KINDS, QUANTIZATIONS, kind_of

ROWS = [name for name, kind in KINDS.items() if kind.keeps_rows]
EDGES = [0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0, 3.0e38, 1e-40, 0.0078125, -0.00782]


def walk(numel: int, rows: int, scale: float = 1e-4, seed: int = 0) -> list[torch.Tensor]:
    """theta_0 .. theta_rows in float32."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(rows, numel, generator=generator) * scale
    return list(torch.cat([torch.randn(1, numel, generator=generator) * 0.02, steps]).cumsum(0))


def follow(name: str, states: list[torch.Tensor]) -> tuple[torch.Tensor, list, torch.Tensor]:
    """Encode a walk: final state, increments, H built row by row."""
    kind = KINDS[name]
    state, increments, rows = states[0].to(kind.dtype).clone(), [], []
    for theta in states[1:]:
        increments.append(kind.rows.encode(state, theta))
        kind.rows.advance(state, increments[-1])
        rows.append(kind.rows.dots(increments, len(theta)))
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for t, row in enumerate(rows):
        gram[t, : t + 1] = gram[: t + 1, t] = row
    return state, increments, gram


def dense(name: str, states: list[torch.Tensor], increments: list) -> torch.Tensor:
    """The increments as a float64 matrix, by other code than the encoding's own arithmetic."""
    if name == "bf16":
        rounded = torch.stack([theta.to(torch.bfloat16).double() for theta in states])
        return rounded.diff(dim=0)
    numel = len(states[0])
    rows = []
    for one in increments:
        if one.bits == 0:
            rows.append(one.code.double())
            continue
        code = one.code
        if one.bits == 4:
            low, high = code.to(torch.int16) & 15, code.to(torch.int16) >> 4
            code = torch.stack([low, high], 1).flatten()
            code = torch.where(code > 7, code - 16, code)
        rows.append((code.double() * one.scale.double().repeat_interleave(quantized.GROUP)[: len(code)])[:numel])
    return torch.stack(rows)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("numel", [1, 63, 64, 65, sparse.BLOCK - 1, sparse.BLOCK + 1, 300_001])
def test_gram_matches_dense(name: str, numel: int) -> None:
    states = walk(numel, rows=4)
    _, increments, gram = follow(name, states)
    rows = dense(name, states, increments)
    expected = rows @ rows.T
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ROWS)
def test_chunks_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = walk(sparse.BLOCK * 3 + 17, rows=3)
    _, whole_increments, whole = follow(name, states)
    monkeypatch.setattr(sparse, "CHUNK", sparse.BLOCK)
    monkeypatch.setattr(quantized, "CHUNK", 128 * quantized.GROUP)
    state, cut_increments, cut = follow(name, states)
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=0)
    coefficients = [0.5, -1.0, 2.0]
    parts = KINDS[name].accumulate(state, cut_increments, coefficients)
    monkeypatch.undo()
    assert torch.equal(parts, KINDS[name].accumulate(state, whole_increments, coefficients))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.one_of(st.sampled_from(EDGES), st.floats(-4, 4, width=16))] * 3), min_size=1, max_size=40)
)
def test_bf16_replay_is_exact_to_the_bit(rows: list[tuple[float, float, float]]) -> None:
    states = list(torch.tensor(rows, dtype=torch.float32).T.contiguous().to(torch.bfloat16))
    state, increments = states[0].clone(), []
    for theta in states[1:]:
        increments.append(sparse.encode(state, theta))
        sparse.advance(state, increments[-1])
        assert torch.equal(state.view(torch.int16), theta.view(torch.int16))
    row = sparse.dots(increments, len(state))
    first, last = states[1].double() - states[0].double(), states[2].double() - states[1].double()
    torch.testing.assert_close(row, torch.stack([last @ first, last @ last]), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_shard_may_begin_anywhere_in_a_block_of_states(name: str, offset: int) -> None:
    """Four bfloat16 weights are compared at a time, and a shard of odd length lets the next one begin within a word."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(offset)
    block = torch.randn(1000 + offset, generator=generator).to(kind.dtype)
    state, alone = block[offset:], block[offset:].clone()
    new = alone.clone()
    new[torch.randperm(1000, generator=generator)[:40]] *= 1.01
    increment, expected = kind.rows.encode(state, new), kind.rows.encode(alone, new)
    assert all(torch.equal(getattr(increment, one), getattr(expected, one)) for one in vars(expected))
    kind.rows.advance(state, increment)
    kind.rows.advance(alone, expected)
    assert torch.equal(state, alone)
    assert increment.changed > 0


def test_signed_zero_is_kept_but_is_no_change() -> None:
    old, new = torch.tensor([0.0, 1.0]).bfloat16(), torch.tensor([-0.0, 1.0]).bfloat16()
    increment = sparse.encode(old, new)
    assert sparse.dots([increment], 2).item() == 0.0
    sparse.advance(old, increment)
    assert torch.equal(old.view(torch.int16), new.view(torch.int16))


def replayed(name: str, origin: torch.Tensor, increments: list) -> list[torch.Tensor]:
    """The state after each increment, float64."""
    kind, states = KINDS[name], [origin.to(KINDS[name].dtype).clone()]
    for increment in increments:
        states.append(states[-1].clone())
        kind.rows.advance(states[-1], increment)
    return [state.double() for state in states]


def accumulated(name: str, states: list[torch.Tensor], weights: list[float], dtype=torch.bfloat16) -> torch.Tensor:
    """A prediction from a walk, as `relex_verl.pipeline.prediction` makes it."""
    kind = KINDS[name]
    last, increments, _ = follow(name, states)
    anchor = last if kind.rows.anchor_is_last else states[0].to(kind.dtype)
    (coefficients,) = kind.coefficients(torch.tensor([weights], dtype=torch.float64), range(len(weights))).tolist()
    return kind.accumulate(anchor, increments, coefficients, dtype)


@pytest.mark.parametrize("name", ROWS)
def test_accumulate_matches_dense(name: str) -> None:
    """theta_0 + sum_t a_t (state_t - theta_0), with the states as replaying gives them."""
    states = walk(70_000, rows=5)
    _, increments, _ = follow(name, states)
    weights = [3.0, -0.5, 0.0, 1.25, 7.0]
    origin, *later = replayed(name, states[0], increments)
    expected = sum((a * (state - origin) for a, state in zip(weights, later, strict=True)), origin).to(torch.bfloat16)
    predicted = accumulated(name, states, weights)
    assert predicted.dtype == torch.bfloat16
    assert (predicted != expected).float().mean() <= 1e-5
    held = accumulated(name, states, [0.0] * 4 + [1.0])
    assert torch.equal(held, later[-1].to(torch.bfloat16))


@pytest.mark.parametrize("size", [0.03, 0.1, 1.0])
@pytest.mark.parametrize(
    ("name", "rows", "bound"), [("fp32-int8", 15, 5e-4), ("fp32-int8", 60, 1e-4), ("fp32-int4", 60, 2e-3)]
)
def test_weights_much_larger_than_their_changes_do_not_spoil_a_far_prediction(
    name: str, rows: int, bound: float, size: float
) -> None:
    """Adam at 3e-7: a float32 weight of 0.1 has steps of 7e-9. Against exact rows, at 6.7 times the prefix."""
    generator = torch.Generator().manual_seed(0)
    theta, drift = torch.randn(20_000, generator=generator) * size, torch.randn(20_000, generator=generator)
    states = [theta]
    for _ in range(rows):
        noise = torch.randn(20_000, generator=generator)
        states.append((states[-1].double() + 3e-7 * 60 / rows * (0.7 * drift + 0.5 * noise)).float())
    weights = line_hat(range(1, rows + 1), 6.7 * rows).tolist()
    delta = sum(a * (state.double() - theta.double()) for a, state in zip(weights, states[1:], strict=True))
    predicted = accumulated(name, states, weights, torch.float64)
    assert (predicted - theta.double() - delta).norm() <= bound * delta.norm()


@pytest.mark.parametrize(("name", "relative"), [("fp32-int8", 8e-3), ("fp32-int4", 0.13), ("fp32-none", 1e-6)])
@pytest.mark.parametrize("rows", [5, 50])
def test_error_feedback_keeps_the_error_at_one_row(name: str, relative: float, rows: int) -> None:
    """The error after 50 rows is that of one row: measured against the size of one row's change, not of the sum."""
    states = walk(10_000, rows, scale=1e-5)
    state, increments, _ = follow(name, states)
    error = (state.double() - states[-1].double()).abs().max().item()
    assert error <= KINDS[name].rows.error_bound(increments[-1])
    one_row = (states[-1] - states[-2]).double()
    assert (state.double() - states[-1].double()).norm() <= relative * one_row.norm() + 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_no_change_costs_nothing_and_is_nothing(name: str) -> None:
    theta = walk(1000, 0)[0]
    kind = KINDS[name]
    state = theta.to(kind.dtype).clone()
    increment = kind.rows.encode(state, theta)
    assert increment.changed == 0
    assert kind.rows.dots([increment], 1000).tolist() == [0.0]
    kind.rows.advance(state, increment)
    assert torch.equal(state, theta.to(kind.dtype))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name: str, poison: float) -> None:
    theta = walk(100, 0)[0]
    broken = theta.clone()
    broken[7] = poison
    with pytest.raises(ValueError, match="not finite"):
        KINDS[name].rows.encode(theta.to(KINDS[name].dtype), broken)


@pytest.mark.parametrize("name", ROWS)
def test_memory_of_a_row(name: str) -> None:
    """What `row_bytes` promises is what a packed row takes (within the 64-element groups and 65,536-element blocks)."""
    states = walk(1_000_000, rows=1, scale=1e-5)
    _, increments, _ = follow(name, states)
    packed = PackedStep.pack(KINDS[name].part, increments, torch.zeros(1, 1, dtype=torch.float64))
    rate = increments[0].changed / 1_000_000
    assert packed.nbytes <= 1.02 * 1_000_000 * KINDS[name].row_bytes(rate) + 1000


@pytest.mark.parametrize("name", ROWS)
def test_pack_and_unpack(name: str) -> None:
    kind = KINDS[name]
    increments = []
    for numel in (1, 0, 70_001, 64):
        old, new = walk(numel, rows=1)
        increments.append(kind.rows.encode(old.to(kind.dtype), new))
    packed = PackedStep.pack(kind.part, increments, torch.ones(4, 1, dtype=torch.float64))
    for i, increment in enumerate(increments):
        for field in increment.__dataclass_fields__:
            assert torch.equal(getattr(packed.increment(i), field), getattr(increment, field))


def test_settings_name_a_kind() -> None:
    assert kind_of("bf16", "int8").name == "bf16"
    assert {kind_of("fp32", bits).name for bits in QUANTIZATIONS} < set(KINDS)
    assert kind_of("sketch", "int8", 3).size == 3
