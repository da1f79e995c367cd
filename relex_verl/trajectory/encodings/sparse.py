"""`bf16`: the exact change of the bfloat16 weights that the rollout sees, as a sparse vector.

At RLVR learning rates 97-99.5 % of the bf16 weights are bit-identical from one step to the next, so an increment keeps
only the changed elements: a 16-bit index within a block of 65,536 and the change as a bf16 value, 4 bytes each. The change
of a bf16 weight is not always a bf16 value (a weight that crosses zero, about 0.1 %; a zero that changes its sign). Such
an element is an exception and keeps both its old and its new value. Nothing is rounded anywhere: replaying the increments
gives back every observed weight bit for bit.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from relex_verl.trajectory.encodings.packed import Row

__all__ = ["BLOCK", "SparseIncrement", "accumulate", "advance", "dots", "encode", "products", "take"]

BLOCK = 65_536
# Work is done over this many elements at a time: its float64 scratch (32 MiB) stays near the caches, and no temporary
# grows with the tensor. A multiple of BLOCK.
CHUNK = 64 * BLOCK
WORD = 4  # bfloat16 values in an int64
_LOCAL = threading.local()


@dataclass(frozen=True)
class SparseIncrement:
    """e_t = theta_t - theta_{t-1} of one flat shard of n elements.

    Attributes:
        block_count: (ceil(n / BLOCK),) int32, regular entries in each block.
        index: (m,) int16 that holds the unsigned 16-bit offset within the block; ascending.
        value: (m,) bfloat16, the exact change.
        exception_index: (k,) int64 positions whose change is no bfloat16 value.
        exception_old, exception_new: (k,) bfloat16, the weight before and after.
    """

    block_count: torch.Tensor
    index: torch.Tensor
    value: torch.Tensor
    exception_index: torch.Tensor
    exception_old: torch.Tensor
    exception_new: torch.Tensor

    @property
    def changed(self) -> int:
        """Elements whose bits changed."""
        return self.index.numel() + self.exception_index.numel()

    def chunk(self, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries within [start, stop): positions relative to start (int32) and exact changes (float64).

        Args:
            start, stop: multiples of BLOCK, or the end of the shard.
            device: where to put them.
        """
        counts, entries = self._within(start, stop)
        base = torch.arange(len(counts), dtype=torch.int32, device=device) * BLOCK
        position = base.repeat_interleave(counts.to(device), output_size=entries.stop - entries.start)
        position += self.index[entries].to(device).to(torch.int32) & 0xFFFF
        change = self.value[entries].to(device).double()
        odd, exact = self._exceptions(start, stop)
        if odd.numel():
            position = torch.cat([position, odd.to(device)])
            change = torch.cat([change, exact.to(device)])
        return position, change

    def _within(self, start: int, stop: int) -> tuple[torch.Tensor, slice]:
        """Regular entries of each block within [start, stop), and where they stand."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        if first == 0 and last == self.block_count.numel():
            return self.block_count, slice(0, self.index.numel())
        counts = self.block_count[first:last]
        before = int(self.block_count[:first].sum())
        return counts, slice(before, before + int(counts.sum()))

    def _exceptions(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Exceptions within [start, stop): positions relative to start (int32), exact changes (float64)."""
        if not self.exception_index.numel():
            return self.exception_index.int(), self.exception_new.double()
        within = (self.exception_index >= start) & (self.exception_index < stop)
        exact = self.exception_new[within].double() - self.exception_old[within].double()
        return (self.exception_index[within] - start).int(), exact


def _chunks(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK))


def encode(old: torch.Tensor, new: torch.Tensor) -> SparseIncrement:
    """The increment from `old` to `new`, computed on the device of `new`, kept on the host.

    Args:
        old: (n,) bfloat16, the weights at the row before; on any device.
        new: (n,) the weights now; rounded to bfloat16 as the rollout sees them.

    Raises:
        ValueError: shards that do not fit, or weights that are not finite.
    """
    if old.shape != new.shape or old.ndim != 1 or old.dtype != torch.bfloat16:
        raise ValueError(
            f"need two flat shards, the old one bfloat16; got {old.dtype} {[*old.shape]} and {[*new.shape]}"
        )
    parts = [_encode_chunk(old[start:stop].to(new.device), new[start:stop], start) for start, stop in _chunks(len(new))]
    if not parts:
        parts = [_encode_chunk(old, new, 0)]
    return SparseIncrement(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _encode_chunk(old: torch.Tensor, new: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
    new = new.to(torch.bfloat16)
    position = _changed(old.view(torch.int16), new.contiguous().view(torch.int16))
    # Gathers are `index_select`: advanced indexing takes three times as long.
    before, after = old.index_select(0, position), new.index_select(0, position)
    if not after.isfinite().all():
        raise ValueError("weights are not finite (NaN or infinity): the training run itself has diverged")
    change = after.double() - before.double()
    value = change.to(torch.bfloat16)
    # Regular is what replays to the same bits: old + value must be the new weight (float64 loses 1e-30 beside 1), and a
    # change to -0 must be kept aside, since x + (-x) is +0.
    replays = before.float() + value.float() == after.float()
    regular = (value.double() == change) & replays & (value != 0) & (after.view(torch.int16) != -(2**15))
    kept, odd = regular.nonzero().flatten(), (~regular).nonzero().flatten()
    entries = position.index_select(0, kept)
    block_ends = (torch.arange(-(-len(new) // BLOCK), device=new.device) + 1) * BLOCK
    count = torch.searchsorted(entries, block_ends).diff(prepend=block_ends.new_zeros(1))
    return (
        count.to(torch.int32).cpu(),
        (entries & 0xFFFF).to(torch.int16).cpu(),
        value.index_select(0, kept).cpu(),
        (position.index_select(0, odd) + start).cpu(),
        before.index_select(0, odd).cpu(),
        after.index_select(0, odd).cpu(),
    )


def _changed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Ascending positions at which two int16 arrays differ. Four at a time first, since few do."""
    words = len(new) // WORD
    if words:
        # What does not begin where a word does (a shard behind one of odd length) is copied there.
        old, new = (bits if bits.storage_offset() % WORD == 0 else bits.clone() for bits in (old, new))
        ends = words * WORD
        old_words, new_words = old[:ends].view(torch.int64), new[:ends].view(torch.int64)
        differing = (old_words != new_words).nonzero().flatten()
        if len(differing) < words // WORD:
            changed_words = old_words.index_select(0, differing) ^ new_words.index_select(0, differing)
            within = changed_words.view(torch.int16).nonzero().flatten()
            position = differing.index_select(0, within >> 2) * WORD + (within & (WORD - 1))
            tail = (old[ends:] != new[ends:]).nonzero().flatten() + ends
            return torch.cat([position, tail])
    return (old != new).nonzero().flatten()


def _scratch(device: torch.device) -> torch.Tensor:
    """(CHUNK,) float64, this thread's, never cleared: fresh memory for every chunk would cost more than the work itself."""
    mine = vars(_LOCAL)
    if str(device) not in mine:
        mine[str(device)] = torch.empty(CHUNK, dtype=torch.float64, device=device)
    return mine[str(device)]


def dots(increments: Sequence[SparseIncrement], numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The new row of H: inner products of the last increment with every one, itself included.

    In float64: within a block in the order of the entries, exceptions last, and the blocks one after another.

    Args:
        increments: e_1 .. e_t of one shard.
        numel: n, elements of the shard.
        device: where to compute.

    Returns:
        (t,) float64 on the host.
    """
    device = torch.device(device)
    row_T = torch.zeros(len(increments), dtype=torch.float64, device=device)
    if not increments[-1].changed:
        return row_T.cpu()
    for start, stop in _chunks(numel):
        position, change = increments[-1].chunk(start, stop, device)
        if not len(position):
            continue
        dense = _scratch(device)
        dense.index_copy_(0, position.long(), change)
        now = torch.zeros(stop - start, dtype=torch.bool, device=device)
        now.index_fill_(0, position.long(), True)
        # Few elements change in both steps: only their products are formed.
        segment, positions, changes = _in_both(increments, now, start, stop)
        blocks = -(-(stop - start) // BLOCK)
        lengths = torch.bincount(segment, minlength=len(increments) * blocks)
        products = dense.index_select(0, positions) * changes
        sums = torch.segment_reduce(products, "sum", lengths=lengths, initial=0, unsafe=True)
        for block_T in sums.view(len(increments), blocks).unbind(1):
            row_T += block_T
    return row_T.cpu()


def products(increments: Sequence[SparseIncrement], numel: int, wanted: Sequence[int]) -> list[torch.Tensor]:
    """Rows of H, of increments that all are there: (t + 1,) for each wanted number t of one, as `dots` gives it."""
    return [dots(increments[: t + 1], numel) for t in wanted]


def take(
    state: torch.Tensor, new: torch.Tensor, before: Sequence[Row[SparseIncrement]], room: None = None
) -> tuple[SparseIncrement, torch.Tensor, int]:
    """A row: the increment; the new row of H, (t,) float64; elements whose bits changed.

    Args:
        state, new: see `encode`.
        before: e_1 .. e_{t-1}.
        room: none; how much it will take is not known before.
    """
    increment = encode(state, new)
    row_T = dots([*(row.increment for row in before), increment], len(state), new.device)
    return increment, row_T, increment.changed


def _in_both(
    increments: Sequence[SparseIncrement], now: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries within [start, stop) of all increments at positions where `now` is true, block by block of each.

    Returns:
        Number of the increment times that of the blocks, plus that of its block; position relative to start; exact change;
        regular entries before exceptions.
    """
    device = now.device
    parts = [increment._within(start, stop) for increment in increments]
    counts = torch.cat([count for count, _ in parts]).to(device)
    index = torch.cat([increment.index[entries] for increment, (_, entries) in zip(increments, parts, strict=True)]).to(
        device
    )
    base = torch.arange(len(parts[0][0]), dtype=torch.int32, device=device).repeat(len(parts)) * BLOCK
    position = base.repeat_interleave(counts, output_size=len(index)) + (index.to(torch.int32) & 0xFFFF)
    hit = now.index_select(0, position).nonzero().flatten()
    value = torch.cat([increment.value[entries] for increment, (_, entries) in zip(increments, parts, strict=True)]).to(
        device
    )
    ends = torch.tensor([entries.stop - entries.start for _, entries in parts], device=device).cumsum(0)
    step = torch.searchsorted(ends, hit, right=True)
    odd = [increment._exceptions(start, stop) for increment in increments]
    odd_position = torch.cat([positions for positions, _ in odd]).to(device)
    odd_hit = now.index_select(0, odd_position).nonzero().flatten()
    odd_ends = torch.tensor([positions.numel() for positions, _ in odd], device=device).cumsum(0)
    step = torch.cat([step, torch.searchsorted(odd_ends, odd_hit, right=True)])
    odd_exact = torch.cat([exact for _, exact in odd]).to(device)
    position = torch.cat([position.index_select(0, hit), odd_position.index_select(0, odd_hit)])
    change = torch.cat([value.index_select(0, hit).double(), odd_exact.index_select(0, odd_hit)])
    segment, order = (step * len(parts[0][0]) + position // BLOCK).sort(stable=True)
    return segment, position.index_select(0, order), change.index_select(0, order)


def accumulate(
    last: torch.Tensor,
    increments: Sequence[SparseIncrement],
    coefficients: Sequence[float],
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """theta_last + sum_t (w_t - 1) e_t in float64, rounded once.

    Args:
        last: (n,) bfloat16, the weights at the last observed row.
        increments: e_1 .. e_T.
        coefficients: w_t - 1 for each of them.
        dtype: to round to.

    Returns:
        (n,) of that dtype on the host, the predicted weights. Elements that never changed keep their bits.
    """
    predicted = torch.empty(last.shape, dtype=dtype)
    for start, stop in _chunks(len(last)):
        total = last[start:stop].cpu().double()
        for increment, coefficient in zip(increments, coefficients, strict=True):
            position, change = increment.chunk(start, stop, total.device)
            # `alpha` would round once or twice, as the processor has it.
            total.index_add_(0, position, coefficient * change)
        predicted[start:stop] = total.to(dtype)
    return predicted


def advance(state: torch.Tensor, increment: SparseIncrement) -> None:
    """Apply an increment in place, bit for bit: theta_{t-1} becomes theta_t.

    Args:
        state: (n,) bfloat16 on the host.
        increment: e_t.
    """
    offset = torch.arange(len(increment.block_count)) * BLOCK
    position = offset.repeat_interleave(increment.block_count.long())
    position += increment.index.to(torch.int64) & 0xFFFF
    # old + (new - old) with an exact difference is exact in float32.
    changed = (state.index_select(0, position).float() + increment.value.float()).to(torch.bfloat16)
    state.index_copy_(0, position, changed)
    state[increment.exception_index] = increment.exception_new
