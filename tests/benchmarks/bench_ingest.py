"""Ingest and extrapolate against only reading: `.venv/bin/python tests/benchmarks/bench_ingest.py [--millions 140]`.

Makes a Llama-shaped base and checkpoints in which a share of the weights changes at every step, then, each in its own
process: reads base and checkpoints with safetensors (every tensor copied into memory, one after another), and runs ingest +
extrapolate as the commands do; the files on disk (out of the page cache), as those of a finished run are. Prints seconds,
processor seconds and the peak of resident memory (file pages included) at three sizes: medians of three tries, and of their
ratios, each of a reading and the work right after it, since a disk that others use is now fast and now slow.

Exits with 1 when the largest size takes more than 3 times as long as reading or peaks above 1.5 GB, or when a parameter
costs it half as much again as it costs a smaller size (which has as many tensors, so as much to do for each of them).
Results: README.md beside this file.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

MOST_TIMES, MOST_GB, MOST_GROWTH = 3.0, 1.5, 1.5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
READ = """
from safetensors import safe_open
for folder in ["{root}/base"] + ["{root}/run/global_step_%d" % t for t in range(1, {steps} + 1)]:
    with safe_open(folder + "/model.safetensors", framework="pt") as handle:
        for name in handle.keys():
            handle.get_tensor(name).clone()
"""
WORK = """
from pathlib import Path
from relex_verl.offline.ingest import find_checkpoints, ingest
from relex_verl.maths.extrapolators import Prediction
from relex_verl.pipeline.prediction import extrapolate, write_checkpoint
root = Path("{root}")
trajectory = ingest(str(root / "base"), find_checkpoints(root / "run"), "bench", root / "trajectory")
shards = extrapolate(trajectory, {steps}, Prediction("relex", 10 * {steps}))
write_checkpoint(trajectory, shards, root / "predicted", {{}})
"""
# As the command does, before torch is loaded: threads that wait do not spin.
MEASURE = """
import relex_verl.cli.environment
import json, os, resource, time
import torch, safetensors.torch, relex_verl.offline.ingest
begin, processor = time.perf_counter(), time.process_time()
{body}
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(json.dumps([time.perf_counter() - begin, time.process_time() - processor, used]))
"""


def shapes(elements: float) -> dict[str, tuple[int, ...]]:
    """Of a Llama-like model with about so many parameters; width grows, 12 layers."""
    width = 64 * max(1, round(((elements / 12) / 20) ** 0.5 / 64))
    named = {"model.embed_tokens.weight": (max(256, int(elements - 12 * 16 * width * width) // width), width)}
    for layer in range(12):
        at = f"model.layers.{layer}."
        named |= {f"{at}self_attn.{one}_proj.weight": (width, width) for one in "qkvo"}
        named |= {f"{at}mlp.{one}_proj.weight": (4 * width, width) for one in ("gate", "up")}
        named |= {f"{at}mlp.down_proj.weight": (width, 4 * width), f"{at}input_layernorm.weight": (width,)}
    return named | {"model.norm.weight": (width,)}


def make(root: Path, elements: float, steps: int, rate: float, dtype: torch.dtype) -> int:
    """Write base and checkpoints; the number of parameters."""
    torch.manual_seed(0)
    weights = {name: (torch.randn(shape) * 0.02).to(dtype) for name, shape in shapes(elements).items()}
    for step in range(steps + 1):
        folder = root / (f"run/global_step_{step}" if step else "base")
        folder.mkdir(parents=True)
        for tensor in weights.values() if step else ():
            flat = tensor.view(-1)
            if dtype == torch.float32:
                flat.add_(torch.randn(flat.shape), alpha=1e-6)
                continue
            chosen = torch.randint(0, len(flat), (max(1, int(rate * len(flat))),))
            flat[chosen] = (flat[chosen].float() * (1 + 0.01 * torch.randn(len(chosen)))).to(dtype)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.numel() for tensor in weights.values())


def measure(body: str, root: Path, steps: int, cold: bool) -> list[float]:
    """Seconds, processor seconds, peak GB of a fresh process."""
    for folder in ("trajectory", "predicted"):
        shutil.rmtree(root / folder, ignore_errors=True)
    for path in root.rglob("*.safetensors") if cold else ():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    code = MEASURE.format(body=body.format(root=root, steps=steps))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def bench(elements: float, given: argparse.Namespace) -> tuple[float, float, float]:
    """One size: times as long as reading, peak GB, processor nanoseconds a parameter and step."""
    with tempfile.TemporaryDirectory(prefix="bench-ingest-", dir=given.dir) as temporary:
        root, steps, cold = Path(temporary), given.steps, not given.cached
        count = make(root, elements, steps, given.rate, DTYPES[given.dtype])
        how = (root, steps, cold)
        tries = [(measure(READ, *how), measure(WORK, *how)) for _ in range(given.tries)]
    read, work = ([median(one[i][k] for one in tries) for k in range(3)] for i in (0, 1))
    ratios, peak = [work[0] / read[0] for read, work in tries], max(one[1][2] for one in tries)
    times, each = median(ratios), work[1] / count / steps * 1e9
    print(
        f"{count / 1e6:6.1f} M {given.dtype}, {steps} steps: read {read[0]:.2f} s ({read[1]:.2f} of a processor), "
        f"ingest + extrapolate {work[0]:.2f} s ({work[1]:.2f}): {times:.2f} times as long ({min(ratios):.2f} to "
        f"{max(ratios):.2f}), {each:.2f} processor ns a parameter and step, peak {peak:.2f} GB",
        flush=True,
    )
    return times, peak, each


def out_of_bounds(sizes: list[tuple[float, float, float]], cached: bool) -> list[str]:
    """What the verdict is about, a line each.

    Args:
        sizes: what `bench` found, smallest size first.
        cached: whether the files were in the page cache, which says nothing of the time.
    """
    (times, peak, _), each = sizes[-1], [size[2] for size in sizes]
    wrong = []
    if times > MOST_TIMES and not cached:
        wrong.append(f"{times:.2f} times as long as reading is more than {MOST_TIMES}")
    if peak > MOST_GB:
        wrong.append(f"{peak:.2f} GB is more than {MOST_GB}")
    if each[-1] > MOST_GROWTH * min(each):
        wrong.append(f"not linear: {min(each):.2f}, then {each[-1]:.2f} processor ns a parameter and step")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Three sizes and a verdict; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=140, help="parameters of the largest size")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01, help="share of the bf16 weights that change a step")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument(
        "--cached", action="store_true", help="leave the files in the page cache: no verdict on the time"
    )
    parser.add_argument("--dir", type=Path, help="where the files go: on the disk to be measured")
    given = parser.parse_args(arguments)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    wrong = out_of_bounds([bench(given.millions / share * 1e6, given) for share in (4, 2, 1)], given.cached)
    print(*wrong or ["within all bounds"], sep="\n")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
