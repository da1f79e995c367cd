"""What observing a step costs, against floors: the bytes that must move, and one read of the new and of the old shard.

    .venv/bin/python tests/benchmarks/bench_observe.py [--params 60e6] [--change-rate 0.01] [--encoding NAME]
    .venv/bin/python tests/benchmarks/bench_observe.py --memory [--params 240e6] [--rows 16]

Runs the product's own `Observer` in a process of its own for each case. The first form prints how long an observation
takes (encoding, the new row of H, applying the change, the file, to a RAM disk where there is one) at a few rows, as
medians of `--tries` successive rows of its ratio to the *byte floor* of that row (`floors.py`), measured right after it,
and to a read of both shards: by the clock, and in processor seconds, which a busy machine stretches less. Exits with 1
where processor seconds are beyond the bounds of `CASES`.

The second form prints the host memory that following takes for each parameter, at its peak and after the last row, beside
what `relex_verl.run.budget` promises. Memory is anonymous memory above that of the weights themselves (pages of files are
the system's); it is measured at two sizes, so that what the libraries and the allocator take once does not count. Exits with
1 when the peak is more than promised and one byte for what a step has in hand, or memory after the last row for fp32-int8
more than 4 + 1.1 x rows bytes.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from floors import byte_floor, read_both
from safetensors.torch import save_file

from relex_verl.pipeline.observer import Observer
from relex_verl.trajectory.kinds import KINDS
from relex_verl.trajectory.shards import TensorShard, whole

# The largest single tensor of an 8B model is 8% of a rank's shard on 8 GPUs.
TENSORS = 12
# Encoding, the row to measure at, the most that it may take in byte floors.
CASES = [
    ("fp32-int8", 1, 2.5), ("fp32-int8", 16, 2.5), ("bf16", 1, 2.5), ("bf16", 75, 2.5),
    ("fp32-int4", 1, 3.5), ("fp32-int4", 16, 3.5), ("sketch-4", 1, 3.5), ("sketch-4", 16, 3.5),
]  # fmt: skip


class Weights:
    """A rank's float32 weights, changed in place."""

    def __init__(self, params: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        size = params // TENSORS // 64 * 64
        self.tensors = {
            # Not rounded to bfloat16: a run's weights lie anywhere between two of its values.
            f"layer_{i}.weight": torch.randn(size, generator=generator).mul_(0.02).to(dtype)
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

    def leap(self, change_rate: float, seed: int) -> None:
        """Like `step`, in a fraction of the time: all by the same noise; of bfloat16 weights some, by a place or two."""
        generator = torch.Generator().manual_seed(seed)
        if next(iter(self.tensors.values())).dtype == torch.bfloat16:
            for tensor in self.tensors.values():
                chosen = torch.randint(len(tensor), (int(len(tensor) * change_rate),), generator=generator)
                tensor[chosen] *= 1 + 2**-7
            return
        noise = torch.randn(2**20, generator=generator).mul_(1e-6)
        for tensor in self.tensors.values():
            for piece in tensor.split(2**20):
                piece += noise[: len(piece)]


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


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of all processors."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def time_rows(name: str, params: int, row: int, tries: int, change_rate: float) -> dict[str, float]:
    """Observations from a row on: medians of seconds, and of their ratios to both floors."""
    # What an engine hands out for a trajectory of its kind.
    weights = Weights(params, torch.bfloat16 if name == "bf16" else torch.float32)
    found: list[list[float]] = []
    with workplace() as folder:
        save_file({k: v.to(torch.bfloat16) for k, v in weights.tensors.items()}, folder / "model.safetensors")
        observer = Observer(folder / "trajectory", str(folder), {}, {}, KINDS[name])
        observer.start(weights)
        observer.open(0)
        for step in range(1, row + tries):
            weights.leap(change_rate, step)
            observed = timed(lambda step=step: observer.observe(step, weights))
            if step >= row:
                floor = timed(byte_floor(observer, weights.tensors, folder))
                read = timed(read_both(observer, weights.tensors))
                found.append([*observed, *floor, *read])
    ratios = [[one[0] / one[2], one[1] / one[3], one[0] / one[4], one[1] / one[5]] for one in found]
    keys = ("seconds", "processor", "floor", "floor_processor", "read", "read_processor", "x", "px", "reads", "preads")
    return dict(
        zip(keys, map(median, zip(*(a + b for a, b in zip(found, ratios, strict=True)), strict=True)), strict=True)
    )


def follow(name: str, weights: Weights, rows: int, change_rate: float) -> tuple[Observer, list[float]]:
    """Observe so many steps: the observer, and the shares that changed."""
    with workplace() as folder:
        save_file({k: v.to(torch.bfloat16) for k, v in weights.tensors.items()}, folder / "model.safetensors")
        observer = Observer(folder / "trajectory", str(folder), {}, {}, KINDS[name])
        observer.start(weights)
        observer.open(0)
        rates = []
        for step in range(1, rows + 1):
            weights.step(change_rate, step)
            seen = observer.observe(step, weights)
            rates.append(seen.changed_share if math.isfinite(seen.changed_share) else 0.0)
    return observer, rates


def measure(name: str, params: int, rows: int, change_rate: float) -> dict[str, float]:
    """Follow one run in this process: bytes above the weights, and the share that changed."""
    follow(name, Weights(10**6), 2, change_rate)
    weights = Weights(params)
    before = anonymous()
    with Peak() as peak:
        _observer, rates = follow(name, weights, rows, change_rate)
    found = {"params": weights.params, "held": anonymous() - before, "peak": peak.most - before}
    promised = KINDS[name].state_bytes + KINDS[name].fixed_bytes
    promised += sum(KINDS[name].row_bytes(rate) for rate in rates)
    return {**found, "promised": promised, "rate": sum(rates) / rows}


def apart(options: list[str]) -> dict[str, float]:
    """What this file prints as JSON in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def against_floors(name: str, row: int, most: float, params: int, tries: int, change_rate: float) -> bool:
    """Print a case's line; whether its processor seconds are within its bound."""
    options = ["--row", str(row), "--tries", str(tries), "--params", str(params), "--change-rate", str(change_rate)]
    seen = apart([*options, "--encoding", name])
    print(
        f"{name:10} row {row:3} | {seen['seconds'] * 1e3:6.0f} ms, floor {seen['floor'] * 1e3:5.0f}: {seen['x']:5.2f} x |"
        f" processors {seen['processor'] * 1e3:6.0f} ms, floor {seen['floor_processor'] * 1e3:5.0f}: {seen['px']:5.2f} x,"
        f" at most {most} | reads of both shards: {seen['reads']:5.1f}, of processors {seen['preads']:5.1f}",
        flush=True,
    )
    return seen["px"] <= most


def compare(name: str, params: int, rows: int, change_rate: float) -> bool:
    """Print an encoding's line from two sizes; whether memory kept within its bounds."""

    # What is not compressed fits into the same memory with fewer weights.
    params = int(params * min(1, 24 / (KINDS[name].state_bytes + rows * KINDS[name].row_bytes(0.01))))
    options = ["--memory", "--rows", str(rows), "--change-rate", str(change_rate), "--encoding", name]
    small, large = (apart(["--params", str(size), *options]) for size in (params // 3, params))
    more = large["params"] - small["params"]
    held, peak = ((large[key] - small[key]) / more for key in ("held", "peak"))
    promised = large["promised"]
    print(
        f"{name:10} bytes a parameter: {held:5.2f} after the last row, {peak:5.2f} at the peak,"
        f" {promised:5.2f} promised | changed {large['rate']:6.2%}",
        flush=True,
    )
    return peak <= promised + 1 and (name != "fp32-int8" or held <= 4 + 1.1 * rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, help="parameters of the shard (60e6; 240e6 for memory)")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    parser.add_argument("--rows", type=int, default=16, help="with --memory: how many")
    parser.add_argument("--tries", type=int, default=5, help="successive rows whose median is taken")
    parser.add_argument(
        "--change-rate", type=float, default=0.01, help="share of the bfloat16 weights that change a row"
    )
    parser.add_argument("--encoding", choices=list(KINDS), help="measure only this one, in this process; print JSON")
    parser.add_argument("--row", type=int, default=1, help="with --encoding: the first row to measure")
    arguments = parser.parse_args()
    params = int(arguments.params or (240e6 if arguments.memory else 60e6))
    rows, change_rate = arguments.rows, arguments.change_rate
    if arguments.encoding and arguments.memory:
        print(json.dumps(measure(arguments.encoding, params, rows, change_rate)))
        return 0
    if arguments.encoding:
        print(json.dumps(time_rows(arguments.encoding, params, arguments.row, arguments.tries, change_rate)))
        return 0
    load = os.getloadavg()[0]
    print(f"{params:.3g} parameters, {torch.get_num_threads()} threads, load {load:.1f} of {os.cpu_count()} processors")
    if arguments.memory:
        names = [name for name in KINDS if not name.startswith("sketch") or name == "sketch-4"]
        kept = [compare(name, params, rows, change_rate) for name in names]
    else:
        kept = [against_floors(*case, params, arguments.tries, change_rate) for case in CASES]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
