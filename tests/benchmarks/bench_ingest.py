"""Ingest and extrapolate against only reading: `python tests/benchmarks/bench_ingest.py [--millions 140] [--steps 20]`.

Makes a Llama-shaped base and checkpoints in which a share of the weights changes at every step, then, each in its own
process: reads base and checkpoints with safetensors (every tensor copied into memory), and runs ingest + extrapolate.
Prints seconds, processor seconds, their ratios and the peak of resident memory (file pages included) at three sizes, with
the files in the page cache and from disk. Processor seconds are given since other work on the machine stretches the clock.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

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
from relex_verl.ingest import find_checkpoints, ingest
from relex_verl.prediction import Prediction, extrapolate, write_checkpoint
root = Path("{root}")
trajectory = ingest(str(root / "base"), find_checkpoints(root / "run"), "bench", root / "trajectory")
shards = extrapolate(trajectory, {steps}, Prediction("relex", 10 * {steps}))
write_checkpoint(trajectory, shards, root / "predicted", {{}})
"""
MEASURE = """
import json, os, resource, time
import torch, safetensors.torch, relex_verl.ingest
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


def measure(body: str, root: Path, steps: int) -> list[float]:
    """Seconds, processor seconds, peak GB of a fresh process."""
    code = MEASURE.format(body=body.format(root=root, steps=steps))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def evict(root: Path) -> None:
    """Drop the checkpoints from the page cache: a finished run is read from disk."""
    for path in root.rglob("*.safetensors"):
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench(elements: float, steps: int, rate: float, dtype: str) -> None:
    """One size, with the files in the page cache, and from disk."""
    with tempfile.TemporaryDirectory(prefix="bench-ingest-") as temporary:
        root = Path(temporary)
        count = make(root, elements, steps, rate, DTYPES[dtype])
        print(f"{count / 1e6:.1f} M {dtype}, {steps} steps, change rate {rate}", flush=True)
        for cold in (False, True):
            shutil.rmtree(root / "trajectory", ignore_errors=True)
            if cold:
                evict(root)
            read = measure(READ, root, steps)
            if cold:
                evict(root)
            work = measure(WORK, root, steps)
            print(
                f"  {'from disk' if cold else 'from cache'}: read {read[0]:.2f} s ({read[1]:.2f} cpu), ingest + extrapolate "
                f"{work[0]:.2f} s ({work[1]:.2f} cpu): ratio {work[0] / read[0]:.2f} ({work[1] / read[1]:.2f} cpu), "
                f"{work[1] / count / steps * 1e9:.2f} cpu ns a parameter and step, peak {work[2]:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=140)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01, help="share of the bf16 weights that change a step")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    given = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    for millions in (given.millions / 4, given.millions / 2, given.millions):
        bench(millions * 1e6, given.steps, given.rate, given.dtype)
