"""`fp32`: the change of the float32 master weights, block-quantised with error feedback.

bf16 rounding turns a smooth drift into shot noise: most weights have not yet crossed a rounding boundary. The float32
weights that the optimizer updates show the drift itself. An increment keeps, for each group of 64 elements, one float32
scale and 64 integers (8 or 4 bits). It is the change from the *running reconstruction*, not from the weights one row
earlier, so what one row rounds away is in the next row's change: the error is that of the last row alone and does not add
up. With 0 bits ("none") an increment is the float32 change itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from relex_verl.maths.sums import in_lanes, tree
from relex_verl.trajectory.encodings.packed import Row

__all__ = [
    "GROUP", "QuantizedIncrement", "accumulate", "advance", "dots", "encode", "error_bound", "products", "sizes", "take",
]  # fmt: skip

# Groups of 32 with 2-byte scales take as much room and are no more exact: Adam's changes have no tails.
GROUP = 64
LEVELS = {8: 127, 4: 7}  # largest code
DTYPES = {8: torch.int8, 4: torch.uint8, 0: torch.float32}  # of what the codes lie in
# Elements at a time. A multiple of GROUP, small so that what is expanded to float32 and float64 stays near the caches.
CHUNK = 4096 * GROUP


@dataclass(frozen=True)
class QuantizedIncrement:
    """e_t of one flat shard of n elements, m = ceil(n / 64) groups.

    Attributes:
        code: 8 bits: (64 m,) int8; 4 bits: (32 m,) uint8, two codes a byte, low nibble first; none: (n,) float32.
        scale: (m,) float32, the change is scale * code; empty for none.
    """

    code: torch.Tensor
    scale: torch.Tensor

    @property
    def bits(self) -> int:
        """Bits of a code; 0 for none."""
        return next(bits for bits, dtype in DTYPES.items() if dtype == self.code.dtype)

    @property
    def changed(self) -> int:
        """Elements whose change was not rounded to 0."""
        return int(_unpack(self.code).count_nonzero()) if self.bits == 4 else int(self.code.count_nonzero())

    def codes(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Codes of the elements [start, stop) in groups, (g, 64) float32; the last group is padded with 0."""
        if self.bits == 4:
            return _unpack(self.code[start // 2 : -(-stop // GROUP) * GROUP // 2].to(device)).float().view(-1, GROUP)
        if self.bits == 8:
            return self.code[start : -(-stop // GROUP) * GROUP].to(device).float().view(-1, GROUP)
        return _grouped(self.code[start:stop].to(device))

    def added_to(self, state: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """`state` and the change of the elements [start, stop), summed in float64; (stop - start,) on the host."""
        if self.bits == 8:  # not by way of float32
            codes = self.code[start : -(-stop // GROUP) * GROUP].double().view(-1, GROUP)
        else:
            codes = self.codes(start, stop, torch.device("cpu")).double()
        if self.bits:
            codes *= self.scale[start // GROUP : -(-stop // GROUP)].double().unsqueeze(1)
        return codes.flatten()[: stop - start].add_(state)


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK))


def _grouped(flat: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    nibbles = codes.to(torch.int8).view(-1, 2) & 0xF
    return (nibbles[:, 0] | (nibbles[:, 1] << 4)).view(torch.uint8)


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    """Sign-extended nibbles, int8."""
    signed = packed.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=1).flatten()


def encode(state: torch.Tensor, new: torch.Tensor, bits: int = 8) -> QuantizedIncrement:
    """The increment that leads from the reconstruction `state` to (nearly) `new`; computed on the device of `new`.

    The error of an element is at most half a quantum, max|change in its group| / (2 * 127) for 8 bits.

    Args:
        state: (n,) float32, the reconstruction at the row before; on any device.
        new: (n,) the weights now.
        bits: 8, 4, or 0 for none.

    Raises:
        ValueError: shards that do not fit, or weights that are not finite.
    """
    if state.shape != new.shape or state.ndim != 1 or state.dtype != torch.float32:
        raise ValueError(
            f"need two flat shards, the old one float32; got {state.dtype} {[*state.shape]}, {[*new.shape]}"
        )
    codes = [torch.empty(0, dtype=DTYPES[bits])]
    scales = [torch.empty(0)]
    for start, stop in _chunks(len(new)):
        change = new[start:stop].float() - state[start:stop].to(new.device)
        groups = _grouped(change)
        largest = groups.abs().amax(dim=1)  # not finite where any of the group is not
        if not largest.isfinite().all():
            raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
        if not bits:
            codes.append(change.cpu())
            continue
        scale = largest / LEVELS[bits]
        groups /= torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        code = groups.round_().clamp_(-LEVELS[bits], LEVELS[bits]).flatten()  # a subnormal scale has few digits
        codes.append((_pack(code) if bits == 4 else code.to(torch.int8)).cpu())
        scales.append(scale.cpu())
    return QuantizedIncrement(torch.cat(codes), torch.cat(scales))


def sizes(numels: Sequence[int], bits: int = 8) -> dict[str, tuple[int, torch.dtype]]:
    """Elements of each field of the increments of shards with so many weights, all together, and their types."""
    groups = sum(-(-numel // GROUP) for numel in numels)
    code = {8: GROUP * groups, 4: GROUP // 2 * groups, 0: sum(numels)}[bits]
    return {"code": (code, DTYPES[bits]), "scale": (groups if bits else 0, torch.float32)}


def advance(state: torch.Tensor, increment: QuantizedIncrement) -> None:
    """Apply an increment to the reconstruction in place.

    Args:
        state: (n,) float32 on the host.
        increment: e_t.
    """
    for start, stop in _chunks(len(state)):
        state[start:stop] = increment.added_to(state[start:stop], start, stop)


def dots(increments: Sequence[QuantizedIncrement], numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The new row of H: inner products of the last increment with every one, itself included.

    Within a group the products of codes are summed in float32, which is exact (64 * 127^2 < 2^24); the rest is float64, in
    the order of `maths.sums` within a chunk, and the chunks one after another.

    Args:
        increments: e_1 .. e_t of one shard.
        numel: n, elements of the shard.
        device: where to compute.

    Returns:
        (t,) float64 on the host.
    """
    device = torch.device(device)
    row_T = torch.zeros(len(increments), dtype=torch.float64, device=device)
    for start, stop in _chunks(numel):
        row_T += in_lanes(_group_products(increments, start, stop, device))
    return row_T.cpu()


def _group_products(
    increments: Sequence[QuantizedIncrement], start: int, stop: int, device: torch.device
) -> torch.Tensor:
    """Inner products with the last increment of each group within [start, stop), (t, g) float64."""
    if not increments[-1].bits:
        last = increments[-1].codes(start, stop, device).double()
        return torch.stack([tree(increment.codes(start, stop, device) * last) for increment in increments])
    last = increments[-1].codes(start, stop, device)
    # One row at a time stays in the caches; a batched product of so small matrices is five times as slow.
    products_Tg = torch.stack([(increment.codes(start, stop, device) * last).sum(dim=1) for increment in increments])
    groups = slice(start // GROUP, -(-stop // GROUP))
    scales_Tg = torch.stack([increment.scale[groups] for increment in increments]).to(device).double()
    return products_Tg.double() * (scales_Tg * scales_Tg[-1])


def products(increments: Sequence[QuantizedIncrement], numel: int, wanted: Sequence[int]) -> list[torch.Tensor]:
    """Rows of H, of increments that all are there: (t + 1,) for each wanted number t of one, as `dots` gives it."""
    return [dots(increments[: t + 1], numel) for t in wanted]


def take(
    state: torch.Tensor,
    new: torch.Tensor,
    before: Sequence[Row[QuantizedIncrement]],
    room: QuantizedIncrement,
    bits: int = 8,
) -> tuple[QuantizedIncrement, torch.Tensor, int]:
    """A row: the increment, put into `room`; the new row of H, (t,) float64; elements whose change was not rounded to 0.

    Args:
        state, new, bits: see `encode`.
        before: e_1 .. e_{t-1}.
        room: of the `sizes` of this shard.
    """
    increment = encode(state, new, bits)
    room.code.copy_(increment.code)
    room.scale.copy_(increment.scale)
    row_T = dots([*(row.increment for row in before), increment], len(state), new.device)
    return room, row_T, increment.changed


def accumulate(
    origin: torch.Tensor,
    increments: Sequence[QuantizedIncrement],
    weights: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """theta_0 + sum_t a_t (state_t - theta_0) in float64, rounded once; the states are replayed.

    Not theta_last + sum_t (w_t - 1) e_t: the float32 state takes only the digits of e_t that it has, so the increments do
    not add up to its movement, and a far target would multiply the difference.

    Args:
        origin: (n,) theta_0.
        increments: e_1 .. e_T.
        weights: a_t for each of them.
        dtype: to round to.

    Returns:
        (n,) of that dtype on the host, the predicted weights.
    """
    predicted = torch.empty(origin.shape, dtype=dtype)
    for start, stop in _chunks(len(origin)):
        begin = origin[start:stop].cpu().double()
        state, total = begin.clone(), begin.clone()
        for increment, weight in zip(increments, weights, strict=True):
            state = increment.added_to(state, start, stop).float().double()  # as `advance` does
            total += weight * (state - begin)  # `alpha` would round once or twice, as the processor has it
        predicted[start:stop] = total.to(dtype)
    return predicted


def error_bound(increment: QuantizedIncrement) -> float:
    """How far the reconstruction can be from float32 weights: a quantum of the coarsest group.

    Half of it from the code, and as much again from rounding the state to float32, where the weight itself has a place.
    """
    if not increment.bits:
        return 2**-23 * float(increment.code.abs().max()) if increment.code.numel() else 0.0
    return 1.0001 * float(increment.scale.max()) if increment.scale.numel() else 0.0  # the change is rounded, too
