"""What observing a step costs, against the floor: one read of the new and of the old shard.

    .venv/bin/python tests/benchmarks/bench_observe.py [--params 240e6] [--rows 16] [--change-rate 0.01] [--encoding NAME]

Runs the product's own `Observer` in a process of its own for each encoding, and prints: the time of an observation
(encoding, the new row of H, applying the change, the file, to a RAM disk where there is one) at the first and at the last
row, as a ratio to reading both shards once in the same process; and the host memory that following takes for each
parameter, at its peak and after the last row, beside what `relex_verl.run.budget` promises. Memory is anonymous memory above
that of the weights themselves (pages of files are the system's); it is measured at two sizes, so that what the libraries
and the allocator take once (100 to 150 MB) does not count. Ratios and bytes of one run; exits with 1 when the peak is more
than promised and one byte for what a step has in hand, or memory after the last row for fp32-int8 more than
4 + 1.1 x rows bytes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard, whole

# The largest single tensor of an 8B model is 8% of a rank's shard on 8 GPUs.
TENSORS = 12


class Weights:
    """A rank's float32 weights, changed in place."""

    def __init__(self, params: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = params // TENSORS // 64 * 64
        self.tensors = {
            # Not rounded to bfloat16: a run's weights lie anywhere between two of its values.
            f"layer_{i}.weight": torch.randn(size, generator=generator).mul_(0.02)
            for i in range(TENSORS)
        }
        self.params = size * TENSORS

    def __iter__(self) -> Iterator[TensorShard]:
        for name, tensor in self.tensors.items():
            yield TensorShard(name, tuple(tensor.shape), whole(tensor.shape), tensor)

    def step(self, change_rate: float, seed: int) -> None:
        """Move every weight a little, so that about `change_rate` of the bfloat16 weights change."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.tensors.values():
            for piece in tensor.split(2**20):
                piece += piece.abs() * 2**-8 * change_rate * torch.randn(piece.shape, generator=generator)


def anonymous() -> int:
    """Bytes of anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The most anonymous memory within a `with` block."""

    def __enter__(self) -> "Peak":
        self.most, self._over = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder on a RAM disk, or an ordinary one."""
    ram = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=ram if os.access(ram, os.W_OK) else None) as folder:
        yield Path(folder)


def floor_seconds(shards: list[torch.Tensor]) -> float:
    """Fastest of a few reads of both shards, as words: reading, not adding, is to cost."""
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        for tensor in shards:
            tensor.view(torch.int64).sum()
        best = min(best, time.perf_counter() - begin)
    return best


def follow(name: str, weights: Weights, rows: int, change_rate: float) -> tuple[Observer, list[float], list[float]]:
    """Observe so many steps: the observer, the seconds of each, and the shares that changed."""
    with workplace() as folder:
        save_file({k: v.to(torch.bfloat16) for k, v in weights.tensors.items()}, folder / "model.safetensors")
        observer = Observer(folder / "trajectory", str(folder), {}, {}, KINDS[name])
        observer.start(weights)
        observer.open(0)
        times, rates = [], []
        for step in range(1, rows + 1):
            weights.step(change_rate, step)
            begin = time.perf_counter()
            seen = observer.observe(step, weights)
            times.append(time.perf_counter() - begin)
            rates.append(seen.changed_share if math.isfinite(seen.changed_share) else 0.0)
    return observer, times, rates


def measure(name: str, params: int, rows: int, change_rate: float) -> dict[str, float]:
    """Follow one run in this process: bytes above the weights, seconds, and shares that changed."""
    follow(name, Weights(10**6), 2, change_rate)
    weights = Weights(params)
    before = anonymous()
    with Peak() as peak:
        observer, times, rates = follow(name, weights, rows, change_rate)
    found = {"params": weights.params, "held": anonymous() - before, "peak": peak.most - before}
    states = [one.state for one in observer.held.values()]
    floor = floor_seconds([*states, *(tensor.to(states[0].dtype) for tensor in weights.tensors.values())])
    promised = KINDS[name].state_bytes + KINDS[name].fixed_bytes
    promised += sum(KINDS[name].row_bytes(rate) for rate in rates)
    return {
        **found,
        "first": times[0],
        "last": times[-1],
        "floor": floor,
        "promised": promised,
        "rate": sum(rates) / rows,
    }


def compare(name: str, params: int, rows: int, change_rate: float) -> bool:
    """Print an encoding's line from two sizes; whether memory kept within its bounds."""

    def apart(size: int) -> dict[str, float]:
        options = ["--params", str(size), "--rows", str(rows), "--change-rate", str(change_rate), "--encoding", name]
        done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    # What is not compressed fits into the same memory with fewer weights.
    params = int(params * min(1, 24 / (KINDS[name].state_bytes + rows * KINDS[name].row_bytes(0.01))))
    small, large = apart(params // 3), apart(params)
    more = large["params"] - small["params"]
    held, peak = ((large[key] - small[key]) / more for key in ("held", "peak"))
    floor, promised = large["floor"], large["promised"]
    print(
        f"{name:10} floor {floor * 1e3:6.0f} ms | row 1: {large['first'] / floor:5.1f} x, row {rows}:"
        f" {large['last'] / floor:5.1f} x | bytes a parameter: {held:5.2f} after the last row, {peak:5.2f} at the peak,"
        f" {promised:5.2f} promised | changed {large['rate']:6.2%}",
        flush=True,
    )
    return peak <= promised + 1 and (name != "fp32-int8" or held <= 4 + 1.1 * rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=240e6, help="parameters of the shard")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument(
        "--change-rate", type=float, default=0.01, help="share of the bfloat16 weights that change a row"
    )
    parser.add_argument("--encoding", choices=list(KINDS), help="measure only this one, in this process; print JSON")
    arguments = parser.parse_args()
    params, rows, change_rate = int(arguments.params), arguments.rows, arguments.change_rate
    if arguments.encoding:
        print(json.dumps(measure(arguments.encoding, params, rows, change_rate)))
        return 0
    print(f"{arguments.params:.3g} parameters, {arguments.rows} rows, {torch.get_num_threads()} threads")
    names = [name for name in KINDS if not name.startswith("sketch") or name == "sketch-4"]
    kept = [compare(name, params, rows, change_rate) for name in names]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
