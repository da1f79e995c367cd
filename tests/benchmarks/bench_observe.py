"""What observing a step costs, against the floor: one read of the new and of the old shard.

    .venv/bin/python tests/benchmarks/bench_observe.py [--params 20e6] [--rows 16] [--change-rate 0.01]

Prints, for each encoding, the time of an observation (encoding, the new row of H, applying the change; no disk) at the
first and at the last row, as a ratio to reading both shards once in the same process, and the memory held for each
parameter beside what `relex_verl.budget` promises. Ratios from one run; nothing is asserted but the memory bound.
"""

import argparse
import time

import torch

from relex_verl.encodings import ENCODINGS, PackedStep


def seconds(work, repeat: int = 3) -> float:
    """Fastest of a few."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def step(theta: torch.Tensor, change_rate: float, generator: torch.Generator) -> torch.Tensor:
    """Move every weight a little, so that about `change_rate` of the bfloat16 weights change."""
    size = theta.abs() * 2**-8 * change_rate
    return theta + size * torch.randn(theta.shape, generator=generator)


def measure(name: str, params: int, rows: int, change_rate: float) -> None:
    encoding = ENCODINGS[name]
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(params, generator=generator) * 0.02
    state = theta.to(encoding.dtype).clone()
    packed: list[PackedStep] = []
    times, rates = [], []
    for _ in range(rows):
        theta = step(theta, change_rate, generator)
        begin = time.perf_counter()
        increment = encoding.encode(state, theta.to(encoding.dtype))
        encoding.dots([*(one.increment(0) for one in packed), increment], params)
        encoding.advance(state, increment)
        times.append(time.perf_counter() - begin)
        rates.append(increment.changed / params)
        packed.append(PackedStep.pack(encoding.part, [increment], torch.zeros(1, len(packed) + 1)))
    old, new = state.view(torch.int64), theta.to(encoding.dtype).view(torch.int64)  # words: reading, not adding, costs
    floor = seconds(lambda: (old.sum(), new.sum()))
    held = (state.nbytes + sum(one.nbytes for one in packed)) / params
    promised = encoding.state_bytes + sum(encoding.row_bytes(rate) for rate in rates)
    print(
        f"{name:10} floor {floor * 1e3:7.1f} ms | row 1: {times[0] / floor:6.1f} x | row {rows}: {times[-1] / floor:6.1f} x"
        f" | changed {sum(rates) / rows:6.2%} | memory {held:6.2f} bytes a parameter, promised {promised:6.2f}"
    )
    assert held <= promised * 1.02
    if name == "fp32-int8":
        assert held <= 4 + 1.1 * rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=20e6, help="parameters of the shard")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--change-rate", type=float, default=0.01, help="share of the bfloat16 weights that change a row"
    )
    arguments = parser.parse_args()
    print(f"{arguments.params:.3g} parameters, {arguments.rows} rows, {torch.get_num_threads()} threads")
    for name in ENCODINGS:
        measure(name, int(arguments.params) // 4 * 4, arguments.rows, arguments.change_rate)


if __name__ == "__main__":
    main()
