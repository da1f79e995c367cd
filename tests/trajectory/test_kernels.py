"""The compiled kernels against the torch code that they stand in for: the same bits, whatever the shard and the threads."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex_verl.trajectory.encodings import PackedStep, moments, quantized, sparse
from relex_verl.trajectory.kernels import entries
from relex_verl.trajectory.kernels import moments as compiled_moments
from relex_verl.trajectory.kernels import quantized as compiled_quantized
from relex_verl.trajectory.kernels import sparse as compiled_sparse
from relex_verl.trajectory.kinds import KINDS, Kind

ROOT = Path(__file__).parents[2]
CAPTURED = {"capture_output": True, "text": True, "check": False}
WEIGHTS = [1.5, -0.3, 2.0]
BITS = {"fp32-int8": 8, "fp32-int4": 4, "fp32-none": 0}
# The types in which engines hand out what each kind follows.
CASES = [("bf16", torch.bfloat16), ("bf16", torch.float32), *((name, torch.float32) for name in BITS)]
# Ends of groups, of pieces, of blocks and of chunks; several chunks, so that threads have something to share.
SIZES = [1, 63, 65, 4_097, 65_537, 2 * 262_144 + 4_160]


def modules(name: str) -> tuple[ModuleType, ModuleType]:
    return (sparse, compiled_sparse) if name == "bf16" else (quantized, compiled_quantized)


def walk(numel: int, seed: int, share: float, scale: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """theta_0 .. theta_3, in which some weights change, also their signs, to zeros, and to what a float32 barely holds."""
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(numel, generator=generator) * 0.02]
    for _ in WEIGHTS:
        moves = torch.rand(numel, generator=generator) < share
        state = states[-1] + moves * torch.randn(numel, generator=generator) * scale
        for value in (0.0, -0.0, 1e-40, -3e-39, 1e30):
            state[torch.randint(numel, (numel // 1000 + 1,), generator=generator)] = value
        state[torch.randint(numel, (numel // 100,), generator=generator)] *= -1
        states.append(state)
    return [states[0], *(state.to(dtype) for state in states[1:])]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    if one.dtype == torch.bfloat16:
        one, other = one.view(torch.int16), other.view(torch.int16)
    return one.numpy().tobytes() == other.numpy().tobytes()


def follow(kind: Kind, module: ModuleType, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """All that a walk gives: every row, every state, and predictions in several types."""
    options, state = ({"bits": BITS[kind.name]} if kind.name in BITS else {}), states[0].to(kind.dtype, copy=True)
    anchor, rows, found = state.clone(), [], []
    for new in states[1:]:
        sizes = kind.rows.sizes([len(new)])
        room = kind.part(*(torch.empty(size, dtype=dtype) for size, dtype in sizes.values())) if sizes else None
        increment, row_T, changed = module.take(state, new, rows, room, **options)
        assert module.advance(state, increment) is not NotImplemented
        rows.append(PackedStep.pack(kind.part, [increment], torch.zeros(1, 1, dtype=torch.float64)).row(0))
        found += [*vars(increment).values(), row_T, torch.tensor(changed), state.clone()]
    parts = [row.increment for row in rows]
    anchor = state if kind.rows.anchor_is_last else anchor
    dtypes = (torch.bfloat16, torch.float16, torch.float64)
    if kind.name == "bf16":  # those of all rows but the first, as after a cut
        form = entries.products if module is compiled_sparse else sparse.products
        found += form(parts, len(state), [1, 2])
    return found + [module.accumulate(anchor, parts, WEIGHTS, dtype) for dtype in dtypes]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@settings(max_examples=12, deadline=None)
@given(
    numel=st.sampled_from(SIZES) | st.integers(1, 20_000),
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e20, 1e-44]),
    threads=st.integers(1, 3),
)
def test_a_kernel_gives_the_bits_of_torch(
    name: str, dtype: torch.dtype, numel: int, seed: int, share: float, scale: float, threads: int
) -> None:
    states, before = walk(numel, seed, share, scale, dtype), torch.get_num_threads()
    expected, compiled = modules(name)
    try:
        torch.set_num_threads(threads)
        found = follow(KINDS[name], compiled, states)
    finally:
        torch.set_num_threads(before)
    assert all(map(same_bits, found, follow(KINDS[name], expected, states)))


@settings(max_examples=12, deadline=None)
@given(numel=st.sampled_from(SIZES) | st.integers(1, 20_000), seed=st.integers(0, 2**31), size=st.integers(2, 6))
def test_the_kernel_of_a_sketch_gives_the_bits_of_torch(numel: int, seed: int, size: int) -> None:
    origin, *states = walk(numel, seed, 0.5, 1e-3, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    found: list[list[torch.Tensor]] = []
    change = torch.randn(size, size, generator=generator, dtype=torch.float64)
    for module in (moments, compiled_moments):
        kept = [moments.Moment(torch.zeros(numel)) for _ in range(size)]
        rows = [
            module.add_row(origin, state, kept, [0.3 - t] * size, change if t == 1 else None)
            for t, state in enumerate(states)
        ]
        found.append([*rows, *(one.value for one in kept), module.accumulate(origin, kept, (WEIGHTS * 2)[:size])])
    assert all(map(same_bits, *found))


@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("poison", [float("nan"), float("-inf"), -float("nan")])
def test_weights_that_are_not_finite_are_refused(name: str, dtype: torch.dtype, poison: float) -> None:
    kind, (_, compiled) = KINDS[name], modules(name)
    options = {"bits": BITS[name]} if name in BITS else {}
    new = torch.full((100,), 0.1, dtype=dtype)
    new[70] = poison
    sizes = kind.rows.sizes([100])
    room = kind.part(*(torch.empty(size, dtype=dtype) for size, dtype in sizes.values())) if sizes else None
    with pytest.raises(ValueError, match="not finite"):
        compiled.take(torch.zeros(100, dtype=kind.dtype), new, [], room, **options)


def test_where_nothing_compiles_torch_goes_on_alone(tmp_path: Path) -> None:
    """A broken compiler is a warning, once, and no error; below `WORTH` elements nobody asks for it."""
    (tmp_path / "numba.py").write_text("raise ImportError('no llvm')\n")
    code = """
import sys, torch
from relex_verl.trajectory.kernels import WORTH
from relex_verl.trajectory.kinds import KINDS
kind = KINDS["fp32-int8"]
def advance(numel):
    state = torch.zeros(numel)
    kind.rows.advance(state, kind.rows.encode(state, torch.ones(numel)))
    return state
assert advance(1000).eq(1).all() and "numba" not in sys.modules
assert advance(WORTH).eq(1).all() and advance(WORTH).eq(1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, **CAPTURED
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RELEX computes without its compiled kernels") == 1
